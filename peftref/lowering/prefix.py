"""Prefixes enter attention through transformers' attention interface.

A prefix is handed as the keyword ``peftref`` of the attention call, so that no state outlives it:
a recomputed forward, a compiled one and one row of a batch see their own prefix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from peftref.errors import BackboneError
from peftref.lowering.cache import Prefix, by_cache
from peftref.lowering.disentangled import attend_with_rows
from peftref.lowering.original import original_class
from peftref.lowering.program import BoundEdit
from peftref.ops.choice import FORCED
from peftref.ops.prefix_attention.op import prefix_attention

__all__ = ["Prefix", "build_prefix", "insert_prefix", "interface_name", "own_forward",
           "refuse_unused",
           "register_interface"]

_PREFIX = "peftref_"
_SDPA = "sdpa_attention_forward"
Attention = Callable[..., tuple[Tensor, Tensor | None]]
_FORMS: dict[str, Attention] = {"disentangled": attend_with_rows}


def build_prefix(edits: list[BoundEdit], x: Tensor) -> Prefix:
    """Return the rows of all prefix edits of one attention module, side by side of a kind.

    Args:
        edits: edits of port ``keys_values``; each gives (rows, 2 x heads x width), gated ones
            (batch, rows, ...).
        x: the input of attention (batch, tokens, d), read by gates.
    """
    joined = _side_by_side([e for e in edits if not e.apart], x, like=edits[0])
    if any(e.apart for e in edits):
        joined.apart = _side_by_side([e for e in edits if e.apart], x, like=edits[0])
    return joined


def _side_by_side(edits: list[BoundEdit], x: Tensor, like: BoundEdit) -> Prefix:
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for edit in edits:
        shape = edit.edit.write.site.attention
        if shape is None:
            raise TypeError(f"{edit.edit.write.label}: not an attention site")
        rows = edit.stream(x) if edit.apart else edit.rows_of_tokens(x)
        rows = rows[None] if rows.dim() == 2 else rows
        heads, width = shape.key_value_heads, shape.head_width
        key, value = rows.split((heads * width, shape.row_width - heads * width), -1)
        if edit.apart:
            value = edit.gate(x) * value  # of attention that is linear in its values
        keys.append(key.unflatten(-1, (heads, -1)).transpose(1, 2))
        values.append(value.unflatten(-1, (heads, -1)).transpose(1, 2))
    if not edits:
        shape = like.edit.write.site.attention
        none = x.new_empty(1, 0 if shape is None else shape.key_value_heads, 0, 1)
        return Prefix(none, none)
    batch = max(key.shape[0] for key in keys)
    return Prefix(
        torch.cat([k.expand(batch, -1, -1, -1) for k in keys], 2),
        torch.cat([v.expand(batch, -1, -1, -1) for v in values], 2),
    )


def insert_prefix(
    module: nn.Module, edits: list[BoundEdit], x: Tensor, call: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[Prefix, tuple[Any, ...], dict[str, Any]]:
    """Hand the rows of all prefix edits to a call of an attention module.

    Args:
        module: the attention module.
        edits: its prefix edits.
        x: the first argument of the call.
        call: the positional arguments behind it.
        named: the others.

    Returns:
        The rows, and the arguments with them.
    """
    prefix = build_prefix(edits, x)
    shape = edits[0].edit.write.site.attention
    if shape is None or shape.cache is None:
        return prefix, call, {**named, "peftref": prefix}
    return prefix, (), by_cache(module, shape.cache, prefix, x, call, named)


def own_forward(edits: list[BoundEdit]) -> Attention | None:
    """The forward of ours that takes a prefix where the module's own one cannot."""
    shape = edits[0].edit.write.site.attention
    return None if shape is None or shape.form is None else _FORMS[shape.form]


def refuse_unused(prefix: Prefix, edits: list[BoundEdit]) -> None:
    """Refuse attention that has taken no prefix: it would be ignored without a word.

    Raises:
        BackboneError: neither an attention function nor a cache saw the rows.
    """
    if not prefix.used:
        raise BackboneError(
            f"{edits[0].edit.write.label}: this attention called neither transformers' attention "
            "interface nor its cache, so the prefix had no effect; use another technique here"
        )


def interface_name(base: str) -> str:
    """Name under which the prefix form of a base implementation is registered."""
    return base if base.startswith(_PREFIX) else _PREFIX + base


def register_interface(base: str) -> str:
    """Register the prefix form of implementation ``base``; return its name.

    The mask function goes with it: under a name that transformers does not know for masks it
    would build none, and the padding mask would be lost without a word.

    Raises:
        BackboneError: the implementation takes no prefix.
    """
    if base.startswith(_PREFIX):
        return base
    if "flash" in base or "flex" in base:
        raise BackboneError(
            f"attention implementation {base!r} takes no prefix; load the backbone with "
            "attn_implementation='sdpa' or 'eager'"
        )
    name = interface_name(base)
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _prefixed(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _base_attention(base: str, module: nn.Module) -> Attention:
    if base == "eager":
        # The plain form is a function of the model's own file, not in the registry.
        return sys.modules[original_class(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _prefixed(base: str) -> Attention:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        peftref: Prefix | None = None,
        **kwargs: Any,  # noqa: ANN401 - transformers' own keywords
    ) -> tuple[Tensor, Tensor | None]:
        attention = _base_attention(base, module)
        if peftref is None:
            return attention(module, query, key, value, attention_mask, **kwargs)
        return _attend(attention, peftref, (module, query, key, value, attention_mask), kwargs)

    return attend


def _attend(
    attention: Attention,
    prefix: Prefix,
    call: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor | None],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    module, query, key, value, mask = call
    prefix.used = True
    if prefix.apart is not None:
        beside = _alone(query, prefix.apart, kwargs.get("scaling"))
        rest = Prefix(prefix.keys, prefix.values)
        y, scores = _attend(attention, rest, call, kwargs) if rest.keys.shape[2] else (
            attention(module, query, key, value, mask, **kwargs))
        return y + beside, scores
    rows, queries = prefix.keys.shape[2], query.shape[2]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (rows, 0))
    if mask is not None:
        visible = True if mask.dtype == torch.bool else 0.0
        mask = nn.functional.pad(mask, (rows, 0), value=visible)
    elif queries > 1 and _is_causal(module, kwargs):
        # Without a mask sdpa takes the causal one as upper left, or crops the keys: both wrong
        # beside a prefix, hence a mask in full.
        key, value = key[:, :, :queries], value[:, :, :queries]
        same = query.shape[-1] == value.shape[-1] == prefix.values.shape[-1]
        if attention.__name__ == _SDPA and same and _takes_op(kwargs):
            pairs = (prefix.keys, key), (prefix.values, value)
            y = prefix_attention(query, *pairs, scale=kwargs.get("scaling"), causal=True)
            return y.transpose(1, 2).contiguous(), None
        mask = torch.ones(queries, queries + rows, dtype=torch.bool, device=query.device)
        mask = mask.tril(rows)[None, None]
        if attention.__name__ == "eager_attention_forward":
            mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    batch = key.shape[0]
    keys = prefix.keys.to(key.dtype).expand(batch, -1, -1, -1)
    values = prefix.values.to(value.dtype).expand(batch, -1, -1, -1)
    if attention.__name__ != "eager_attention_forward":
        kwargs["is_causal"] = False
    else:
        kwargs.pop("is_causal", None)
    key, value = torch.cat((keys, key), 2), torch.cat((values, value), 2)
    return attention(module, query, key, value, mask, **kwargs)


def _alone(query: Tensor, rows: Prefix, scale: float | None) -> Tensor:
    """Attention over the rows and nothing else, (batch, queries, heads, width)."""
    groups = query.shape[1] // rows.keys.shape[1]
    keys, values = (
        t.to(query.dtype).repeat_interleave(groups, 1) for t in (rows.keys, rows.values))
    scores = query @ keys.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    shares = scores.softmax(-1, dtype=wide).to(query.dtype)
    return (shares @ values).transpose(1, 2)


def _takes_op(kwargs: dict[str, Any]) -> bool:
    """Whether the op of a causal block beside a prefix computes the same."""
    return not FORCED and not kwargs.get("dropout") and kwargs.get("position_bias") is None


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)

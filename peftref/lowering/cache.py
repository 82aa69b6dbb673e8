"""Prefixes of attention that never calls the attention interface: they enter at its cache."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from peftref.backbone.site_table import CacheArgument
from peftref.lowering.original import original_class

__all__ = ["Prefix", "PrefixCache", "by_cache"]


@dataclass(slots=True)
class Prefix:
    """Key and value rows that every query sees: (batch or 1, key-value heads, rows, width).

    ``used`` turns true when an attention function or a cache has taken the rows. Over the rows of
    ``apart`` attention is taken alone, and added.
    """

    keys: Tensor
    values: Tensor
    used: bool = False
    apart: Prefix | None = None


class PrefixCache:
    """The cache of one attention call with a prefix in front; the rows are never stored in it.

    Args:
        inner: the model's own cache, where it keeps one.
        prefix: the rows.
        order: for each row of the batch where each key comes from (see ``_behind_padding``).
    """

    def __init__(self, inner: Any, prefix: Prefix, order: Tensor | None) -> None:  # noqa: ANN401 - caches have no common type
        self.inner = inner
        self.prefix = prefix
        self.order = order

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401, E501
        """Store the keys and values of the call; give all of them behind the prefix."""
        self.prefix.used = True
        if self.inner is not None:
            key, value = self.inner.update(key, value, *args, **kwargs)
        return self._behind(self.prefix.keys, key), self._behind(self.prefix.values, value)

    def get_seq_length(self, *args: Any) -> int:  # noqa: ANN401
        """Number of tokens that the model has stored: the prefix is none of them."""
        return 0 if self.inner is None else self.inner.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.inner, name)

    def _behind(self, rows: Tensor, own: Tensor) -> Tensor:
        # Falcon repeats its key-value heads before it stores them.
        rows = rows.to(own.dtype).repeat_interleave(own.shape[1] // rows.shape[1], 1)
        joined = torch.cat((rows.expand(own.shape[0], -1, -1, -1), own), 2)
        if self.order is None:
            return joined
        index = self.order[:, None, :, None].expand(-1, joined.shape[1], -1, joined.shape[3])
        return joined.gather(2, index)


def by_cache(
    module: nn.Module, cache: CacheArgument, prefix: Prefix, x: Tensor, call: tuple[Any, ...],
    named: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of an attention call, all but the first by name, with the prefix.

    Args:
        module: the attention module.
        cache: where its cache and what counts keys are.
        prefix: the rows.
        x: the first argument, (batch, tokens, width).
        call: the positional arguments behind it.
        named: the others.
    """
    given = {**dict(zip(_names(original_class(module)), call, strict=False)), **named}
    rows = prefix.keys.shape[2]
    order = None
    for name, kind in cache.pad:
        value = given.get(name)
        if value is None:
            value = _causal(module, x) if kind == "visible" else None
        if value is None:
            continue
        if kind == "distance":
            given[name] = _farther(value, rows)
            continue
        seen = kind == "visible" and value.dtype == torch.bool
        given[name] = pad(value, (rows, 0), value=True if seen else 0)
        if kind == "hidden":
            order = _behind_padding(value, rows)
            given[name] = given[name].gather(-1, order[:, None, None].expand_as(given[name]))
    given[cache.name] = PrefixCache(given.get(cache.name), prefix, order)
    return given


@functools.cache
def _names(base: type[nn.Module]) -> tuple[str, ...]:
    """The names of the forward's parameters behind the first."""
    return tuple(inspect.signature(base.forward).parameters)[2:]


def _causal(module: nn.Module, x: Tensor) -> Tensor | None:
    """The mask that sdpa leaves out and would take as upper left beside a prefix, in full."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    tokens = x.shape[1]
    if implementation != "sdpa" or tokens == 1:
        return None
    return torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()[None, None]


def _farther(bias: Tensor, rows: int) -> Tensor:
    """A bias that is linear in the distance from the last key, for ``rows`` keys more."""
    first, step = bias[..., :1], bias[..., 1:2] - bias[..., :1]
    back = torch.arange(rows, 0, -1, device=bias.device, dtype=bias.dtype)
    return torch.cat((first - step * back, bias), -1)


def _behind_padding(hidden: Tensor, rows: int) -> Tensor:
    """Where each key comes from when the prefix stands behind the padding on the left.

    A bias by distance counts keys from the right: before the padding, the prefix would be the
    farther away the more padding there is.
    """
    padding = hidden[:, 0, -1].long().cumprod(-1).sum(-1, keepdim=True)
    place = torch.arange(rows + hidden.shape[-1], device=hidden.device)[None]
    moved = torch.where(place < padding, place + rows, place - padding)
    return torch.where(place < padding + rows, moved, place)

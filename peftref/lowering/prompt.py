"""Prompts as virtual token ids: every input of a call is extended alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftref.errors import BackboneError
from peftref.spec.selector import Positions

_BY_TOKEN = ("logits", "last_hidden_state", "start_logits", "end_logits", "hidden_states")

__all__ = [
    "RootGuard",
    "class_generate",
    "generate_with_prompt",
    "goes_on",
    "padding_of",
    "with_positions",
    "with_prompt",
    "without_prompt",
]


@dataclass
class RootGuard:
    """What the root checks and adds in every call.

    Attributes:
        prompt: number of learned tokens; ids from ``vocabulary`` on stand for them.
        after: tokens of the text that stay before them: 1 where a head reads the first token.
        prefix: whether attention sees learned rows.
        vocabulary: first virtual token id.
        needs_mask: whether gates need the padding mask.
        collects: whether some edit reads the hidden states of all layers.
        streams: whether layers run on two streams.
        positions: by stack and key, the tokens at which edits act.
        special: ids of the special tokens.
        no_cache: why ``generate`` must be refused; "" when it may run.
        checks: called before each forward outside compilation; they raise what is wrong.
    """

    prompt: int = 0
    after: int = 0
    encoder_decoder: bool = False
    prefix: bool = False
    vocabulary: int = 0
    needs_mask: bool = False
    collects: bool = False
    streams: bool = False
    positions: dict[str, Positions] = field(default_factory=dict[str, Positions])
    special: tuple[int, ...] = ()
    no_cache: str = ""
    generating: bool = False
    checks: dict[str, Callable[[nn.Module], None]] = field(
        default_factory=dict[str, Callable[[nn.Module], None]]
    )

    @property
    def counts_positions(self) -> bool:
        """Whether tokens of a decoder stand behind learned rows."""
        rows = self.prefix or self.prompt > 0
        return rows and self.after == 0 and not self.encoder_decoder


def class_generate(base: type[nn.Module]) -> Callable[..., Any]:
    """The class's own ``generate``; only causal and sequence-to-sequence models have one."""
    return base.generate  # pyright: ignore[reportAttributeAccessIssue]


def goes_on(call: dict[str, Any]) -> bool:
    """Whether this forward goes on from keys and values of an earlier one."""
    state = call.get("cache_params")  # of state-space models
    if state is not None:
        previous = state.has_previous_state
        return bool(previous() if callable(previous) else previous)
    cache = call.get("past_key_values")
    return cache is not None and bool(cache.get_seq_length())


def with_positions(call: dict[str, Any]) -> dict[str, Any]:
    """Count positions from the first token that is no padding.

    Learned rows stand at fixed positions, so that padding in front of the tokens would move them
    away from the rows, also in models that see relative positions only.
    """
    mask, ids = call.get("attention_mask"), call.get("input_ids")
    given = call.get("position_ids") is not None
    if given or ids is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return call
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {**call, "position_ids": positions[:, -ids.shape[1] :]}


def with_prompt(guard: RootGuard, call: dict[str, Any], *, cached: bool) -> dict[str, Any]:
    """Put virtual tokens in front of ids, mask, types, positions and labels alike.

    Where an earlier forward has put them into the cache (or the encoder's output), only the mask
    still misses them.
    """
    if cached or call.get("encoder_outputs") is not None:
        return _behind_prompt(guard, call)
    ids = call.get("input_ids")
    if ids is None:
        raise BackboneError("a prompt needs input_ids; inputs_embeds carry no virtual tokens")
    if guard.encoder_decoder:
        _refuse_shifted_ids(call)
    call = dict(call)
    padding = padding_of(guard, call)
    call["input_ids"] = _front(guard, ids, None, padding)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if call.get(name) is not None:
            call[name] = _front(guard, call[name], value, padding)
    if call.get("position_ids") is not None:
        positions = call["position_ids"]
        first = torch.arange(guard.prompt, device=ids.device).expand(positions.shape[0], -1)
        kept, moved = positions[:, : guard.after], positions[:, guard.after :] + guard.prompt
        joined = torch.cat((kept, first + guard.after, moved), 1)
        call["position_ids"] = _behind(guard, joined, padding)
    kept = call.get("logits_to_keep")
    if isinstance(kept, Tensor):
        call["logits_to_keep"] = kept + guard.prompt
    elif kept:
        call["logits_to_keep"] = min(kept, ids.shape[1])
    labels = call.get("labels")
    if labels is not None and labels.shape == ids.shape and not guard.encoder_decoder:
        call["labels"] = _front(guard, labels, -100, padding)
    return call


def _refuse_shifted_ids(call: dict[str, Any]) -> None:
    """Some models make the decoder's ids of the encoder's, where virtual ones mean nothing."""
    labels = call.get("labels")
    made = isinstance(labels, Tensor) and labels.dim() > 1
    given = ("decoder_input_ids", "decoder_inputs_embeds")
    if not made and all(call.get(name) is None for name in given):
        raise BackboneError(
            "a prompt in the encoder needs decoder_input_ids, or labels of which they are made: "
            "this call leaves the decoder to read what the encoder reads, as a classification "
            "head of an encoder-decoder does; use prefixes there"
        )


def _behind_prompt(guard: RootGuard, call: dict[str, Any]) -> dict[str, Any]:
    call = dict(call)
    if call.get("attention_mask") is not None:
        padding = padding_of(guard, call)
        call["attention_mask"] = _front(guard, call["attention_mask"], 1, padding)
    if call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"] + guard.prompt
    return call


def padding_of(guard: RootGuard, call: dict[str, Any]) -> Tensor | None:
    """Number of padding tokens in front of each row, (batch, 1); None where there are none."""
    mask = call.get("attention_mask")
    if guard.after or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return (mask == 0).long().cumprod(-1).sum(-1, keepdim=True)


def _behind(guard: RootGuard, joined: Tensor, padding: Tensor | None) -> Tensor:
    """Move the prompt from the very front of each row to right behind its padding.

    Models that count distances between tokens, or see a window of them, would else see the
    prompt the farther away the more padding there is.
    """
    if padding is None:
        return joined
    place = torch.arange(joined.shape[1], device=joined.device)[None]
    moved = torch.where(place < padding, place + guard.prompt, place - padding)
    return joined.gather(1, torch.where(place < padding + guard.prompt, moved, place))


def _front(
    guard: RootGuard, tensor: Tensor, value: int | None, padding: Tensor | None
) -> Tensor:
    batch = tensor.shape[0]
    if value is None:
        virtual = torch.arange(guard.prompt, device=tensor.device) + guard.vocabulary
        front = virtual.to(tensor.dtype).expand(batch, -1)
    else:
        front = tensor.new_full((batch, guard.prompt), value)
    joined = torch.cat((tensor[:, : guard.after], front, tensor[:, guard.after :]), 1)
    return _behind(guard, joined, padding)


def without_prompt(
    guard: RootGuard, result: Any, length: int, padding: Tensor | None  # noqa: ANN401 - an output
) -> Any:  # noqa: ANN401
    """Give token outputs the ``length`` that went in, behind ``padding`` tokens in each row."""
    if guard.generating or guard.encoder_decoder:
        return result

    def strip(value: Any) -> Any:  # noqa: ANN401 - a tensor, or a tuple of them
        if isinstance(value, tuple):
            return tuple(strip(part) for part in value)
        whole = isinstance(value, Tensor) and value.shape[1:2] == (length + guard.prompt,)
        return _strip(guard, value, padding) if whole else value

    for name in _BY_TOKEN:
        value = getattr(result, name, None)
        if value is not None:
            result[name] = strip(value)
    return result


def _strip(guard: RootGuard, value: Tensor, padding: Tensor | None) -> Tensor:
    if padding is not None:
        place = torch.arange(value.shape[1] - guard.prompt, device=value.device)[None]
        place = torch.where(place < padding, place, place + guard.prompt)
        place = place.view(*place.shape, *(1 for _ in value.shape[2:]))
        return value.gather(1, place.expand(-1, -1, *value.shape[2:]))
    rest = value[:, guard.after + guard.prompt :]
    return torch.cat((value[:, : guard.after], rest), 1) if guard.after else rest


def generate_with_prompt(
    model: nn.Module,
    guard: RootGuard,
    base: type[nn.Module],
    inputs: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:  # noqa: ANN401
    """The class's own ``generate`` on ids with the prompt, which is taken off the result."""
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    if ids is None:
        raise BackboneError("generate with a prompt needs input_ids")
    kwargs = dict(kwargs)
    padding = padding_of(guard, kwargs)
    mask = torch.ones_like(ids) if padding is None else kwargs["attention_mask"]
    kwargs["attention_mask"] = _front(guard, mask, 1, padding)
    if kwargs.get("max_length") is not None and not guard.encoder_decoder:
        kwargs["max_length"] += guard.prompt
    guard.generating = True
    try:
        result = class_generate(base)(model, _front(guard, ids, None, padding), **kwargs)
    finally:
        guard.generating = False
    if guard.encoder_decoder:
        return result  # the prompt went to the encoder; what comes back is the decoder's
    if isinstance(result, Tensor):
        return _strip(guard, result, _repeated(padding, result))
    result.sequences = _strip(guard, result.sequences, _repeated(padding, result.sequences))
    return result


def _repeated(padding: Tensor | None, sequences: Tensor) -> Tensor | None:
    """The padding of each sequence; ``generate`` may return several for one row."""
    if padding is None:
        return None
    return padding.repeat_interleave(len(sequences) // len(padding), 0)

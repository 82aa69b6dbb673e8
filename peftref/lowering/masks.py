"""What a call of the whole model tells of its tokens: padding, and the positions of edits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peftref.errors import BackboneError
from peftref.lowering.prompt import RootGuard, goes_on
from peftref.lowering.state import CallContext
from peftref.spec.selector import Positions

__all__ = ["known_in_call"]


@contextmanager
def known_in_call(context: CallContext, guard: RootGuard, call: dict[str, Any]) -> Iterator[None]:
    """Let gates and positions know the tokens of this call while it runs."""
    context.hidden.clear()  # what a failed call left behind
    if not guard.needs_mask:
        yield
        return
    before = context.masks
    masks = _padding(guard, call)
    if guard.prompt:
        stack = "encoder" if guard.encoder_decoder or guard.after else "decoder"
        masks[f"{stack}:words"] = _words(guard, call)
    for name, positions in guard.positions.items():
        masks[name] = _chosen(guard, call, name.split(":")[0], positions)
    context.masks = masks
    try:
        yield
    finally:
        context.masks = before


def _padding(guard: RootGuard, call: dict[str, Any]) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    own, decoder = call.get("attention_mask"), call.get("decoder_attention_mask")
    if isinstance(own, Tensor) and own.dim() == 2:
        masks["encoder"] = masks["text"] = own
        if not guard.encoder_decoder:
            masks["decoder"] = own
    if isinstance(decoder, Tensor) and decoder.dim() == 2:
        masks["decoder"] = decoder
    return masks


def _words(guard: RootGuard, call: dict[str, Any]) -> Tensor:
    """Return the (batch, tokens) mask of real tokens that are no learned rows."""
    ids, padding = call["input_ids"], call.get("attention_mask")
    words = ids < guard.vocabulary
    if isinstance(padding, Tensor) and padding.shape == ids.shape:
        words = words & padding.bool()
    return words


def _chosen(
    guard: RootGuard, call: dict[str, Any], stack: str, positions: Positions
) -> Tensor:
    """Return the (batch, tokens) mask of the selected real tokens."""
    second = stack == "decoder" and guard.encoder_decoder
    ids = call.get("decoder_input_ids" if second else "input_ids") if stack != "vision" else None
    if ids is None and second and not positions.special:
        ids = call.get("labels")  # the model shifts them: as many tokens
    if ids is None:
        raise BackboneError(f"an edit acts at {positions.key} of the {stack}'s tokens, which needs "
                            "their ids; this call has none")
    if goes_on(call):
        return torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    padding = call.get("decoder_attention_mask" if second else "attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(padding, Tensor) and padding.shape == ids.shape:
        real = padding.bool()
    if guard.prompt and not second:
        real = real & (ids < guard.vocabulary)
    rank = real.cumsum(-1)
    chosen = (rank <= positions.first) | (rank > rank[:, -1:] - positions.last)
    if positions.special:
        chosen = chosen | torch.isin(ids, _special(guard, ids))
    return chosen & real


def _special(guard: RootGuard, ids: Tensor) -> Tensor:
    if not guard.special:
        raise BackboneError(
            "an edit acts at special tokens, and this backbone's configuration names none; say "
            "which: adapted.special_tokens = tokenizer.all_special_ids"
        )
    return torch.tensor(guard.special, dtype=ids.dtype, device=ids.device)

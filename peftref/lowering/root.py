"""The model itself, swapped: prompts, padding masks, and what must not happen unseen."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftref.errors import BackboneError
from peftref.lowering.state import CHILD, AdapterState, CallContext
from peftref.lowering.swap import Swapped

__all__ = ["RootGuard", "RootState", "root_class"]


@dataclass
class RootGuard:
    """What the root checks and adds in every call.

    Attributes:
        prompt: number of learned tokens; ids from ``vocabulary`` on stand for them.
        after: tokens of the text that stay before them: 1 where a head reads the first token.
        prefix: whether attention sees learned rows.
        vocabulary: first virtual token id.
        needs_mask: whether gates need the padding mask.
        no_cache: why ``generate`` must be refused; "" when it may run.
        checks: called before each forward outside compilation; they raise what is wrong.
    """

    prompt: int = 0
    after: int = 0
    encoder_decoder: bool = False
    prefix: bool = False
    vocabulary: int = 0
    needs_mask: bool = False
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


class RootState(AdapterState):
    """The root's child: shared tensors of all adapters, the guard, the call context."""

    def __init__(self, context: CallContext) -> None:
        super().__init__(context, "input_ids")
        self.guard = RootGuard()
        self.frozen: list[nn.Parameter] = []
        self.implementations: list[tuple[Any, str]] = []
        self.handles: dict[str, Any] = {}
        self.weight_hash: str | None = None


@functools.cache
def root_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the swapped class of a whole model."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        state: RootState = getattr(self, CHILD)
        guard = state.guard
        if not torch.compiler.is_compiling():
            for check in guard.checks.values():
                check(self)
        if not guard.prompt and not guard.needs_mask and not guard.prefix:
            return base.forward(self, *args, **kwargs)
        call = inspect.signature(base.forward).bind_partial(self, *args, **kwargs).arguments
        call.pop("self")
        call = {**call, **call.pop("kwargs", {})}
        cached = _cached(call)
        if guard.no_cache and cached:
            raise BackboneError(f"a forward that goes on from a cache: {guard.no_cache}")
        if guard.prompt and not guard.generating:
            call = _with_prompt(guard, call, cached=cached)
        if guard.counts_positions and "position_ids" in inspect.signature(base.forward).parameters:
            call = _with_positions(call)
        known = call if guard.needs_mask else {}
        with _masks(state.context, known, encoder_decoder=guard.encoder_decoder):
            result = base.forward(self, **call)
        return _without_prompt(guard, result) if guard.prompt and not cached else result

    def generate(self: nn.Module, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        guard: RootGuard = getattr(self, CHILD).guard
        if guard.no_cache:
            raise BackboneError(f"generate: {guard.no_cache}")
        if not guard.prompt:
            return _generate(base)(self, inputs, **kwargs)
        return _generate_with_prompt(self, base, inputs, kwargs)

    def resize_token_embeddings(_: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, ARG001
        raise BackboneError(
            "resize_token_embeddings replaces modules that carry adapters; resize before attach, "
            "or detach first"
        )

    members: dict[str, Any] = {
        "forward": forward,
        "peftref_base": base,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "resize_token_embeddings": resize_token_embeddings,
    }
    if hasattr(base, "generate"):
        members["generate"] = functools.wraps(_generate(base))(generate)
    cls = type(base.__name__, (SwappedRoot, base), members)
    cls.__qualname__ = base.__qualname__
    return cls


def _generate(base: type[nn.Module]) -> Callable[..., Any]:
    """The class's own ``generate``; only causal and sequence-to-sequence models have one."""
    return base.generate  # pyright: ignore[reportAttributeAccessIssue]


class SwappedRoot(Swapped):
    """Mixin of swapped whole models."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - pickle's own signature
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild_root, (self.peftref_base,), state


def _rebuild_root(base: type[nn.Module]) -> nn.Module:
    cls = root_class(base)
    return cls.__new__(cls)


@contextmanager
def _masks(
    context: CallContext, call: dict[str, Any], *, encoder_decoder: bool
) -> Iterator[None]:
    """Let the padding masks of this call be known to gates while it runs."""
    before = context.masks
    masks: dict[str, Tensor] = {}
    own, decoder = call.get("attention_mask"), call.get("decoder_attention_mask")
    if isinstance(own, Tensor) and own.dim() == 2:
        masks["encoder"] = own
        if not encoder_decoder:
            masks["decoder"] = own
    if isinstance(decoder, Tensor) and decoder.dim() == 2:
        masks["decoder"] = decoder
    context.masks = masks
    try:
        yield
    finally:
        context.masks = before


def _cached(call: dict[str, Any]) -> bool:
    """Whether this forward goes on from keys and values of an earlier one."""
    cache = call.get("past_key_values")
    return cache is not None and bool(cache.get_seq_length())


def _with_positions(call: dict[str, Any]) -> dict[str, Any]:
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


def _with_prompt(guard: RootGuard, call: dict[str, Any], *, cached: bool) -> dict[str, Any]:
    """Put virtual tokens in front of ids, mask, types, positions and labels alike.

    Where an earlier forward has put them into the cache (or the encoder's output), only the mask
    still misses them.
    """
    if cached or call.get("encoder_outputs") is not None:
        return _behind_prompt(guard, call)
    ids = call.get("input_ids")
    if ids is None:
        raise BackboneError("a prompt needs input_ids; inputs_embeds carry no virtual tokens")
    call = dict(call)
    call["input_ids"] = _front(guard, ids, None)
    if call.get("attention_mask") is not None:
        call["attention_mask"] = _front(guard, call["attention_mask"], 1)
    if call.get("token_type_ids") is not None:
        call["token_type_ids"] = _front(guard, call["token_type_ids"], 0)
    if call.get("position_ids") is not None:
        positions = call["position_ids"]
        first = torch.arange(guard.prompt, device=ids.device).expand(positions.shape[0], -1)
        kept, moved = positions[:, : guard.after], positions[:, guard.after :] + guard.prompt
        call["position_ids"] = torch.cat((kept, first + guard.after, moved), 1)
    labels = call.get("labels")
    if labels is not None and labels.shape == ids.shape and not guard.encoder_decoder:
        call["labels"] = _front(guard, labels, -100)
    return call


def _behind_prompt(guard: RootGuard, call: dict[str, Any]) -> dict[str, Any]:
    call = dict(call)
    if call.get("attention_mask") is not None:
        call["attention_mask"] = _front(guard, call["attention_mask"], 1)
    if call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"] + guard.prompt
    return call


def _front(guard: RootGuard, tensor: Tensor, value: int | None) -> Tensor:
    batch = tensor.shape[0]
    if value is None:
        virtual = torch.arange(guard.prompt, device=tensor.device) + guard.vocabulary
        front = virtual.to(tensor.dtype).expand(batch, -1)
    else:
        front = tensor.new_full((batch, guard.prompt), value)
    return torch.cat((tensor[:, : guard.after], front, tensor[:, guard.after :]), 1)


def _without_prompt(guard: RootGuard, result: Any) -> Any:  # noqa: ANN401 - a ModelOutput
    """Give token outputs the length that went in."""
    if guard.generating or guard.encoder_decoder:
        return result
    for name in ("logits", "last_hidden_state", "start_logits", "end_logits"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor) and value.dim() == 3:
            result[name] = _strip(guard, value)
    return result


def _strip(guard: RootGuard, value: Tensor) -> Tensor:
    rest = value[:, guard.after + guard.prompt :]
    return torch.cat((value[:, : guard.after], rest), 1) if guard.after else rest


def _generate_with_prompt(
    model: nn.Module,
    base: type[nn.Module],
    inputs: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:  # noqa: ANN401
    guard: RootGuard = getattr(model, CHILD).guard
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    if ids is None:
        raise BackboneError("generate with a prompt needs input_ids")
    kwargs = dict(kwargs)
    mask = kwargs.get("attention_mask")
    kwargs["attention_mask"] = _front(guard, torch.ones_like(ids) if mask is None else mask, 1)
    if kwargs.get("max_length") is not None and not guard.encoder_decoder:
        kwargs["max_length"] += guard.prompt
    guard.generating = True
    try:
        result = _generate(base)(model, _front(guard, ids, None), **kwargs)
    finally:
        guard.generating = False
    if guard.encoder_decoder:
        return result  # the prompt went to the encoder; what comes back is the decoder's
    if isinstance(result, Tensor):
        return result[:, guard.prompt :]
    result.sequences = result.sequences[:, guard.prompt :]
    return result

"""The model itself, swapped: prompts, padding masks, and what must not happen unseen."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftref.errors import BackboneError
from peftref.lowering.masks import known_in_call
from peftref.lowering.prompt import (
    RootGuard,
    class_generate,
    generate_with_prompt,
    goes_on,
    padding_of,
    with_positions,
    with_prompt,
    without_prompt,
)
from peftref.lowering.state import CHILD, AdapterState, CallContext
from peftref.lowering.swap import Swapped

__all__ = ["RootGuard", "RootState", "root_class"]


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
        if not (guard.prompt or guard.needs_mask or guard.prefix or guard.collects
                or guard.streams):
            return base.forward(self, *args, **kwargs)
        return _run(base, self, state, _by_name(base, self, args, kwargs))

    def generate(self: nn.Module, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        guard: RootGuard = getattr(self, CHILD).guard
        if guard.no_cache:
            raise BackboneError(f"generate: {guard.no_cache}")
        if not guard.prompt:
            given = () if inputs is None else (inputs,)  # not every class calls it `inputs`
            return class_generate(base)(self, *given, **kwargs)
        return generate_with_prompt(self, guard, base, inputs, kwargs)

    def resize_token_embeddings(_: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, ARG001
        raise BackboneError(
            "resize_token_embeddings replaces modules that carry adapters; resize before attach, "
            "or detach first"
        )

    def enable_input_require_grads(self: nn.Module) -> None:
        if _wants_input_gradients(self):
            base.enable_input_require_grads(self)  # pyright: ignore[reportAttributeAccessIssue]

    members: dict[str, Any] = {
        "forward": forward,
        "peftref_base": base,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "resize_token_embeddings": resize_token_embeddings,
        "enable_input_require_grads": enable_input_require_grads,
    }
    if hasattr(base, "generate"):
        members["generate"] = functools.wraps(class_generate(base))(generate)
    cls = type(base.__name__, (SwappedRoot, base), members)
    cls.__qualname__ = base.__qualname__
    return cls


def _wants_input_gradients(model: nn.Module) -> bool:
    """Whether checkpoints, if there are any, need a gradient of their input.

    Others do not, and with it every layer below the lowest edit would be run backward.
    """
    calls = (getattr(m, "_gradient_checkpointing_func", None) for m in model.modules())
    kinds = [call.keywords for call in calls if isinstance(call, functools.partial)]
    return not kinds or any(kind.get("use_reentrant", True) for kind in kinds)


def _run(
    base: type[nn.Module], model: nn.Module, state: RootState, call: dict[str, Any]
) -> Any:  # noqa: ANN401 - whatever the model returns
    guard = state.guard
    cached = goes_on(call)
    if guard.streams and _wants_states(model, call):
        raise BackboneError(
            "output_hidden_states: layers that run on two streams have no states of the "
            "backbone's width; leave it out, or disable the adapter"
        )
    if guard.no_cache and cached:
        raise BackboneError(f"a forward that goes on from a cache: {guard.no_cache}")
    ids = call.get("input_ids")
    as_tuple = guard.prompt > 0 and call.get("return_dict") is False
    padding = padding_of(guard, call)
    if guard.prompt and not guard.generating:
        call = with_prompt(guard, call, cached=cached)
        call["return_dict"] = True  # outputs are told apart by name
    if guard.counts_positions and "position_ids" in inspect.signature(base.forward).parameters:
        call = with_positions(call)
    with known_in_call(state.context, guard, call):
        result = base.forward(model, **call)
    if guard.prompt and not cached and ids is not None:
        result = without_prompt(guard, result, ids.shape[1], padding)
    return result.to_tuple() if as_tuple else result


def _wants_states(model: nn.Module, call: dict[str, Any]) -> bool:
    asked = call.get("output_hidden_states")
    config = getattr(model, "config", None)
    return bool(getattr(config, "output_hidden_states", False) if asked is None else asked)


def _by_name(
    base: type[nn.Module], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by the names that the class's forward gives them."""
    call = inspect.signature(base.forward).bind_partial(model, *args, **kwargs).arguments
    call.pop("self")
    return {**call, **call.pop("kwargs", {})}


class SwappedRoot(Swapped):
    """Mixin of swapped whole models."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - pickle's own signature
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild_root, (self.peftref_base,), state


def _rebuild_root(base: type[nn.Module]) -> nn.Module:
    cls = root_class(base)
    return cls.__new__(cls)

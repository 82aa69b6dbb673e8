"""Swap the class of a module instance: names, keys and ``isinstance`` stay as they are."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftref.errors import BackboneError
from peftref.lowering.collect import collected
from peftref.lowering.state import CHILD, AdapterState, CallContext
from peftref.lowering.streams import run_streams

__all__ = [
    "Swapped",
    "is_swapped",
    "refuse_foreign",
    "set_class",
    "state_of",
    "swap",
    "unswap",
]


_MASKS = "peftref_masks"


class Swapped:
    """Mixin of swapped classes; ``peftref_base`` is the class before."""

    peftref_swapped = True
    peftref_base: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the module, with what belongs to the call handed in as an argument."""
        state: AdapterState = getattr(self, CHILD)
        if state.masked_block and state.context.masks is not None:
            # As an argument of the call, so that a checkpoint hands it to the recomputation.
            kwargs[_MASKS] = dict(state.context.masks)
        call = super().__call__  # pyright: ignore[reportAttributeAccessIssue,reportUnknownVariableType]
        if state.at_seam is not None and state.at_seam.function is not None:
            return state.at_seam.function(call(*args, **kwargs))
        fold = state.fold(self)  # pyright: ignore[reportArgumentType]
        if fold is not None and fold.streams:
            return run_streams(self, state, fold.streams, call, args, kwargs)  # pyright: ignore[reportArgumentType]
        if state.collects is None or state.collects[0] not in state.context.collects:
            return call(*args, **kwargs)
        return collected(self, state, call, args, kwargs)  # pyright: ignore[reportArgumentType]

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - pickle's own signature
        # The class is made at run time and has no importable name of its own.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (self.peftref_base, self._substitutes), state

    _substitutes: tuple[str, ...] = ()


def _rebuild(base: type[nn.Module], substitutes: tuple[str, ...]) -> nn.Module:
    cls = _swapped_class(base, substitutes)
    return cls.__new__(cls)


@functools.cache
def _swapped_class(base: type[nn.Module], substitutes: tuple[str, ...]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        state: AdapterState = getattr(self, CHILD)
        if _MASKS in kwargs:
            before, state.context.masks = state.context.masks, kwargs.pop(_MASKS)
            try:
                return _run(self, state, base, args, kwargs)
            finally:
                state.context.masks = before
        return _run(self, state, base, args, kwargs)

    members: dict[str, Any] = {
        "forward": forward,
        "peftref_base": base,
        "_substitutes": substitutes,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
    }
    members.update({name: _substituted(name) for name in substitutes})
    cls = type(base.__name__, (Swapped, base), members)
    cls.__qualname__ = base.__qualname__
    return cls


def _run(
    module: nn.Module,
    state: AdapterState,
    base: type[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # noqa: ANN401 - whatever the module returns
    fold = state.fold(module)
    if fold is None:
        return base.forward(module, *args, **kwargs)
    if not fold.matrices:
        return fold.run(module, base.forward, args, kwargs)
    fold.matrices.begin()
    try:
        return fold.run(module, base.forward, args, kwargs)
    finally:
        fold.matrices.end()


def _substituted(name: str) -> property:
    """A tensor of the module with its trained difference, as the module's own forward reads it."""

    def get(self: nn.Module) -> Tensor | None:
        tensor = self._parameters.get(name)
        tensor = self._buffers.get(name) if tensor is None else tensor
        fold = getattr(self, CHILD).fold(self)
        if tensor is None or fold is None or tensor.is_meta:  # accelerate looks at what it brings
            return tensor
        return fold.effective(name, tensor)

    def put(self: nn.Module, value: Any) -> None:  # noqa: ANN401
        nn.Module.__setattr__(self, name, value)

    return property(get, put)


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's class was swapped."""
    return isinstance(module, Swapped)


def state_of(module: nn.Module) -> AdapterState:
    """The adapter state of a swapped module."""
    return getattr(module, CHILD)


def swap(
    module: nn.Module, path: str, context: CallContext, substitutes: tuple[str, ...] = ()
) -> AdapterState:
    """Swap a module's class once; return its state, new or old.

    Args:
        module: the module.
        path: its dotted path, for messages.
        context: the call context of the model.
        substitutes: tensors that the module's own forward must see edited.

    Raises:
        BackboneError: another library holds the module in a way that a swap would break.
    """
    if isinstance(module, Swapped):
        missing = tuple(sorted({*substitutes, *module._substitutes}))
        if missing != module._substitutes:
            set_class(module, _swapped_class(module.peftref_base, missing))
        return state_of(module)
    refuse_foreign(module, path)
    base = type(module)
    state = AdapterState(context, _first_parameter(base))
    state.__dict__["host"] = module
    module.add_module(CHILD, state)
    state.train(module.training)
    set_class(module, _swapped_class(base, tuple(sorted(substitutes))))
    return state


def unswap(module: nn.Module, path: str) -> None:
    """Give a module its own class back and remove its adapter state."""
    if not isinstance(module, Swapped):
        raise BackboneError(
            f"{path}: the class of this module changed after attach "
            f"(found {type(module).__name__}); undo that first (for example unshard)"
        )
    base = module.peftref_base
    del module._modules[CHILD]
    set_class(module, base)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class; hooks that accelerate put on it go on to work."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        # accelerate keeps the forward that it wraps on the instance: let it wrap the new one.
        module.__dict__["_old_forward"] = cls.forward.__get__(module)


def refuse_foreign(module: nn.Module, path: str) -> None:
    """Refuse a module on which a swapped class would have no effect, or a wrong one.

    Raises:
        BackboneError: parametrised, sharded, or with a forward that another library put on it.
    """
    if torch.nn.utils.parametrize.is_parametrized(module):
        raise BackboneError(f"{path}: is parametrised; remove its parametrisations first")
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise BackboneError(
            f"{path}: its forward was replaced by another library (as accelerate does for mixed "
            "precision: accelerator.unwrap_model(model, keep_fp32_wrapper=False)); undo that first"
        )
    if CHILD in module._modules or hasattr(module, CHILD):
        raise BackboneError(f"{path}: already has an attribute {CHILD!r}")
    if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
        raise BackboneError(f"{path}: is sharded already; attach before fully_shard")


def _first_parameter(base: type[nn.Module]) -> str:
    names = [p for p in inspect.signature(base.forward).parameters if p != "self"]
    return names[0] if names else ""

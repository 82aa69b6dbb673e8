"""An op of two kernels, forward and backward: registered with torch, and callable directly.

An op's folder has ``reference.py`` (the definition, plain torch), ``cpu.py`` (kernels made of torch
operations; they run on a GPU too, where Triton is missing), ``triton.py`` (kernels for CUDA) and
``op.py``, which makes an ``Operator`` of them. All kernels of an op have the same signature:

    forward(*arguments) -> outputs, then what only the backward pass reads
    backward(...)       -> whatever ``gradients`` asks for

``save`` and ``gradients`` join the two and are pure functions, so that the registered op and the
direct call are one differentiation rule.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from peftref.errors import TrainingError
from peftref.ops.choice import Form, choose, has_triton

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

__all__ = ["Argument", "Kernels", "Needs", "Operator", "Rule", "Saved", "refuse_twice"]

Argument = Tensor | None | int | float | bool | str | Sequence[Tensor] | Sequence[bool]
Tensors = Tensor | Sequence[Tensor]
Gradient = Tensor | Sequence[Tensor | None] | None
Needs = Sequence[bool | Sequence[bool]]
R = TypeVar("R")


class Kernels(NamedTuple):
    """The two halves of an op.

    ``torch.library`` reads the schema of the registered op from the annotations, which hence are
    Tensor, list[Tensor], their optional forms, and numbers.
    """

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]


class Saved(NamedTuple):
    """What the backward pass gets: tensors through autograd, everything else as it is."""

    tensors: Sequence[Tensor]
    constants: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """How the kernels make a differentiable function.

    Attributes:
        save: ``(arguments, results of forward) -> Saved``.
        gradients: ``(needs, saved, output gradients, backward kernel) -> gradients``, one for each
            argument; ``needs`` says which are wanted (a list for a list of tensors). An output
            that nothing reads has no gradient (None); one at least has.
        hidden: how many of the last results only the backward pass reads.
    """

    save: Callable[..., Saved]
    gradients: Callable[..., Sequence[Gradient]]
    hidden: int = 0


class Operator(Generic[R]):
    """An op in all its forms.

    Args:
        name: registered as ``peftref::<name>`` and ``peftref::<name>_backward``.
        reference: the definition; takes the arguments of the forward kernel and returns what is
            visible of its results.
        kernels: of torch operations.
        fake: the shapes: same signatures, empty results.
        rule: joins the kernels.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., R],
        kernels: Kernels,
        fake: Kernels,
        rule: Rule,
    ) -> None:
        self.name = name
        self.reference = reference
        self.kernels = kernels
        self.rule = rule
        self.registered = Kernels(
            _register(name, 0, kernels, fake), _register(name, 1, kernels, fake)
        )
        self.registered.forward.register_autograd(  # pyright: ignore[reportFunctionMemberAccess]
            self._registered_backward, setup_context=self._registered_save
        )
        self.registered.backward.register_autograd(  # pyright: ignore[reportFunctionMemberAccess]
            self._refuse, setup_context=_nothing
        )

    def __call__(self, *arguments: Argument) -> R:
        """Run the op in the form that suits its first argument, which is a tensor."""
        first = arguments[0]
        form = choose(first) if isinstance(first, Tensor) else Form.REFERENCE
        if form is Form.REFERENCE:
            return self.reference(*arguments)
        if form is Form.DIRECT:
            return self.direct(*arguments)
        return self.visible(self.registered.forward(*arguments))

    def direct(self, *arguments: Argument) -> R:
        """Run the kernels without torch's dispatcher."""
        layout = tuple(len(a) if isinstance(a, list) else -1 for a in arguments)
        return cast("R", _Direct.apply(self, layout, *_flat(arguments)))

    def visible(self, results: Tensors) -> R:
        """The results of the forward kernel that callers see."""
        if isinstance(results, Tensor) or not self.rule.hidden:
            return cast("R", results)
        shown = results[: -self.rule.hidden]
        return cast("R", shown[0] if len(shown) == 1 else tuple(shown))

    def _registered_save(
        self, ctx: FunctionCtx, inputs: tuple[Argument, ...], output: Tensors
    ) -> None:
        saved = self.rule.save(inputs, output)
        ctx.save_for_backward(*saved.tensors)
        ctx.set_materialize_grads(False)  # nobody wants gradients of what is hidden
        ctx.constants = saved.constants  # pyright: ignore[reportAttributeAccessIssue]

    def _registered_backward(
        self, ctx: _Context, *gradients: Tensor | list[Tensor | None] | None
    ) -> object:
        saved = Saved(ctx.saved_tensors, ctx.constants)
        flat = gradients[0] if isinstance(gradients[0], list) else gradients
        shown = cast("Sequence[Tensor | None]", flat[: len(flat) - self.rule.hidden])
        found = self._gradients(ctx.needs_input_grad, saved, shown, self.registered.backward)
        return tuple(found) if len(found) > 1 else found[0]

    def _gradients(
        self,
        needs: Needs,
        saved: Saved,
        gradients: Sequence[Tensor | None],
        backward: Callable[..., Tensors],
    ) -> Sequence[Gradient]:
        if all(g is None for g in gradients):
            return [None if isinstance(n, bool) else [None] * len(n) for n in needs]
        return self.rule.gradients(needs, saved, gradients, backward)

    def _refuse(self, *_: object) -> None:
        raise _no_second(self.name)


class _Context(torch.autograd.function.FunctionCtx):
    name: str
    operator: Operator[Tensors]
    layout: tuple[int, ...]
    constants: tuple[object, ...]
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Direct(torch.autograd.Function):
    """The kernels under autograd, without torch's dispatcher."""

    @staticmethod
    def forward(
        ctx: _Context, operator: Operator[Tensors], layout: tuple[int, ...], *flat: Argument
    ) -> Tensors:
        arguments = _nested(flat, layout)
        results = operator.kernels.forward(*arguments)
        saved = operator.rule.save(arguments, results)
        ctx.save_for_backward(*saved.tensors)
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.layout, ctx.constants = operator, layout, saved.constants
        return _no_views(operator.visible(results), saved.tensors)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Argument, ...]:
        operator = ctx.operator
        needs = cast("Needs", _nested(ctx.needs_input_grad[2:], ctx.layout))
        saved = Saved(ctx.saved_tensors, ctx.constants)
        with torch.no_grad():
            found = operator._gradients(needs, saved, gradients, operator.kernels.backward)  # noqa: SLF001 - same file
        flat = _flat(found)
        if torch.is_grad_enabled():
            held = cast("list[Tensor | None]", flat)
            return None, None, *refuse_twice(
                operator.name, held, (*ctx.saved_tensors, *gradients)
            )
        return None, None, *flat


def refuse_twice(
    name: str, found: Sequence[Tensor | None], reads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that say so when they are differentiated by what they were made of."""
    return [None if g is None else _Once.apply(name, g, *reads) for g in found]


def _no_views(results: Tensors, saved: Sequence[Tensor]) -> Tensors:
    """The results, so that callers may add to them in place (Falcon does), as to any other.

    Autograd allows that for no view made in here. What is saved stays a view: it must not change.
    """
    def own(result: Tensor) -> Tensor:
        held = any(result is tensor for tensor in saved)
        return result if held or not result._is_view() else result.data  # noqa: SLF001 - no other way

    if isinstance(results, Tensor):
        return own(results)
    return cast("Tensors", tuple(own(result) for result in results))


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again by what it was made of, and says so."""

    @staticmethod
    def forward(ctx: _Context, name: str, gradient: Tensor, *_: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: _Context, *_: Tensor) -> None:
        raise _no_second(ctx.name)


def _no_second(name: str) -> TrainingError:
    return TrainingError(
        f"op {name}: its gradient cannot be differentiated again; set the environment variable "
        "PEFTREF_OPS=reference before the start for the plain form, which can"
    )


def _register(name: str, half: int, kernels: Kernels, fake: Kernels) -> Callable[..., Tensors]:
    """Register one half with torch; on CUDA Triton's form runs, where Triton is installed."""
    suffix = "_backward" if half else ""
    operator = torch.library.custom_op(
        f"peftref::{name}{suffix}", kernels[half], mutates_args=(), device_types="cpu"
    )

    def on_cuda(*arguments: Argument) -> Tensors:
        # Kernels add with atomics, whose order varies, and have no double precision.
        wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in _flat(arguments))
        plain = wide or torch.are_deterministic_algorithms_enabled()
        if plain or not has_triton() or not _has_kernels(name):
            return kernels[half](*arguments)
        module = importlib.import_module(f"peftref.ops.{name}.triton")
        return (module.backward if half else module.forward)(*arguments)

    operator.register_kernel("cuda", on_cuda)
    operator.register_fake(fake[half])
    return operator


@functools.cache
def _has_kernels(name: str) -> bool:
    """Whether an op has a form for Triton; torch's own products are the best one of some."""
    return Path(__file__).with_name(name).joinpath("triton.py").exists()


def _nothing(ctx: object, inputs: object, output: object) -> None:
    """A gradient that is refused needs nothing kept."""


def _flat(arguments: Iterable[Argument | Gradient]) -> list[Argument]:
    """Lists of tensors opened, since autograd looks at arguments and not into them."""
    flat: list[Argument] = []
    for each in arguments:
        if isinstance(each, list):
            flat.extend(each)
        else:
            flat.append(cast("Argument", each))
    return flat


def _nested(flat: Sequence[Argument], layout: tuple[int, ...]) -> Sequence[Argument]:
    """The inverse of ``_flat``; ``layout`` has the length of every list, -1 for what is none."""
    if max(layout) < 0:
        return flat
    nested: list[Argument] = []
    start = 0
    for length in layout:
        if length < 0:
            nested.append(flat[start])
            start += 1
        else:
            nested.append(cast("Sequence[Tensor]", list(flat[start : start + length])))
            start += length
    return nested

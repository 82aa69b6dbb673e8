"""What every op must satisfy, whatever it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftref.ops.operator import Kernels, Operator

__all__ = [
    "assert_forms_agree",
    "assert_gradients",
    "assert_kernels_agree",
    "assert_registered",
    "leaves",
    "run",
]

Function = Callable[..., object]


def leaves(arguments: Sequence[object]) -> list[Tensor]:
    """The tensors that need a gradient, lists opened."""
    flat = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]


def run(function: Function, arguments: Sequence[object]) -> list[Tensor]:
    """Outputs, then the gradients of a fixed random combination of them."""
    result = function(*arguments)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    weights = [w.to(o) for w, o in zip(weights, outputs, strict=True)]
    wanted = leaves(arguments)
    held = [o.detach() for o in outputs]
    if not wanted:
        return held
    return held + list(torch.autograd.grad(outputs, wanted, weights, materialize_grads=True))


def _as(dtype: torch.dtype, arguments: Sequence[object]) -> list[object]:
    def one(a: object) -> object:
        if isinstance(a, list):
            return [one(t) for t in a]
        if isinstance(a, Tensor) and a.is_floating_point():
            return a.detach().to(dtype).requires_grad_(a.requires_grad)
        return a

    return [one(a) for a in arguments]


def assert_forms_agree(
    operator: Operator[object], arguments: Sequence[object], tolerance: float
) -> None:
    """The direct and the registered form against the definition in float64.

    Outputs and every gradient are compared.

    Args:
        operator: the op.
        arguments: of its forward kernel, in the type to be tested.
        tolerance: of the largest difference, over the largest value of the tensor compared, or
            over 1: a sum of unit arguments that cancel is not known better.
    """
    forms = (operator.direct, lambda *a: operator.visible(operator.registered.forward(*a)))
    _assert_agree(operator, forms, arguments, tolerance)


def assert_kernels_agree(
    operator: Operator[object],
    kernels: Kernels,
    arguments: Sequence[object],
    tolerance: float,
) -> None:
    """Other kernels, joined by the op's own rule, against the definition in float64."""
    other = copy.copy(operator)
    other.kernels = kernels
    _assert_agree(operator, (other.direct,), arguments, tolerance)


def _assert_agree(
    operator: Operator[object],
    forms: Sequence[Function],
    arguments: Sequence[object],
    tolerance: float,
) -> None:
    wanted = run(operator.reference, _as(torch.float64, arguments))
    for form in forms:
        found = run(form, arguments)
        for mine, right in zip(found, wanted, strict=True):
            assert mine.shape == right.shape
            if right.numel():
                scale = right.abs().max().clamp(min=1.0)
                assert (mine - right).abs().div(scale).max() <= tolerance


def assert_gradients(operator: Operator[object], arguments: Sequence[object]) -> None:
    """Against finite differences, in float64."""
    arguments = _as(torch.float64, arguments)
    wanted = leaves(arguments)

    def function(*tensors: Tensor) -> object:
        held = iter(tensors)

        def one(a: object) -> object:
            if isinstance(a, list):
                return [one(t) for t in a]
            return next(held) if isinstance(a, Tensor) and a.requires_grad else a

        return operator.direct(*[one(a) for a in arguments])

    assert torch.autograd.gradcheck(function, wanted)


def assert_registered(operator: Operator[object], arguments: Sequence[object]) -> None:
    """``torch.library.opcheck`` of the registered op, and that a compiler takes it whole."""
    torch.library.opcheck(operator.registered.forward, tuple(arguments))
    torch.compiler.reset()  # all ops are one code object, of which only so many forms are kept
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, arguments), run(operator, arguments))


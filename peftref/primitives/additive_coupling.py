"""A map that is invertible whatever its weights are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftref.errors import CompositionError
from peftref.ir.primitive import (
    Algebra,
    Arguments,
    Operation,
    Place,
    Primitive,
    Runtime,
    TensorSpec,
)
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdditiveCoupling", "AdditiveCouplingArguments"]


class AdditiveCouplingArguments(Arguments):
    """``reduction``: half the stream's width over the hidden width; ``inverse``: undo it."""

    reduction: int = Field(default=2, gt=0)
    inverse: bool = False
    init: str = "normal(0.02)"
    share: str | None = None


@primitives.register("additive_coupling")
class AdditiveCoupling(Primitive[AdditiveCouplingArguments]):
    """NICE: ``o1 = e1 + F(e2)``, ``o2 = e2 + G(o1)`` of the halves of ``e``; exact inverse.

    ``F`` and ``G`` are Linear(d/2, d/2/reduction), ReLU, Linear. MAD-X, Pfeiffer et al. 2020,
    https://arxiv.org/abs/2005.00052; Dinh et al. 2015.
    """

    name = "additive_coupling"
    Arguments = AdditiveCouplingArguments

    def __init__(self, arguments: AdditiveCouplingArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if place.d_in % 2 or place.d_in // 2 < arguments.reduction:
            raise CompositionError(
                f"additive_coupling: reduction {arguments.reduction} leaves no hidden unit, or "
                f"the width {place.d_in} has no halves; give a reduction of at most "
                f"{place.d_in // 2}"
            )

    def tensors(self) -> tuple[TensorSpec, ...]:
        a, half = self.arguments, self.place.d_in // 2
        hidden = half // a.reduction
        found: list[TensorSpec] = []
        for part in ("first", "second"):
            for name, shape, init in (
                ("down.weight", (hidden, half), a.init), ("down.bias", (hidden,), "zeros"),
                ("up.weight", (half, hidden), a.init), ("up.bias", (half,), "zeros"),
            ):
                found.append(TensorSpec(f"{self.label}.{part}.{name}", shape, init, share=a.share))
        return tuple(found)

    def algebra(self) -> Algebra:
        zero = self.arguments.init == "zeros"
        return Algebra(identity_at_init=zero, keeps_zero=True)

    def flops(self) -> int:
        return sum(2 * t.size for t in self.tensors() if len(t.shape) == 2)

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn.functional import linear, relu

        def mlp(x: Tensor, w: tuple[Tensor, ...]) -> Tensor:
            return linear(relu(linear(x, w[0], w[1])), w[2], w[3])

        def forward(x: Tensor, *w: Tensor) -> Tensor:
            e1, e2 = x.chunk(2, -1)
            o1 = e1 + mlp(e2, w[:4])
            return torch.cat((o1, e2 + mlp(o1, w[4:])), -1)

        def inverse(x: Tensor, *w: Tensor) -> Tensor:
            o1, o2 = x.chunk(2, -1)
            e2 = o2 - mlp(o1, w[4:])
            return torch.cat((o1 - mlp(e2, w[:4]), e2), -1)

        return inverse if self.arguments.inverse else forward

"""An edit inside a low-rank subspace of the stream."""

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

__all__ = ["Subspace", "SubspaceArguments"]


class SubspaceArguments(Arguments):
    """``rank`` of the subspace; ``orthogonal``: its rows are kept orthonormal."""

    rank: int = Field(default=4, gt=0)
    orthogonal: bool = True


@primitives.register("subspace")
class Subspace(Primitive[SubspaceArguments]):
    """``f(h) = R^T (W h + b - R h)``; ``R``, ``W`` (r, d), ``R R^T = I``.

    ``R`` is the orthogonal factor of a trained matrix with the signs of its diagonal, computed in
    at least float32. LoReFT; without ``orthogonal`` NoReFT. Wu et al. 2024,
    https://arxiv.org/abs/2404.03592
    """

    name = "subspace"
    Arguments = SubspaceArguments

    def __init__(self, arguments: SubspaceArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if arguments.rank > place.d_in:
            raise CompositionError(
                f"subspace: rank {arguments.rank} is above the width {place.d_in} of the stream"
            )

    def tensors(self) -> tuple[TensorSpec, ...]:
        r, d = self.arguments.rank, self.place.d_in
        return (
            TensorSpec(f"{self.label}.rotation", (r, d), "normal(1.0)"),
            TensorSpec(f"{self.label}.weight", (r, d), "kaiming_uniform"),
            TensorSpec(f"{self.label}.bias", (r,), "zeros"),
        )

    def algebra(self) -> Algebra:
        return Algebra(keeps_zero=True)

    def flops(self) -> int:
        return 4 * self.arguments.rank * self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import linear

        def edit(h: Tensor, rotation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            rows = orthonormal(rotation) if self.arguments.orthogonal else rotation
            return linear(linear(h, weight - rows, bias), rows.t())

        return edit


def orthonormal(matrix: Tensor) -> Tensor:
    """Return ``R`` (r, d) with orthonormal rows that span those of ``matrix``."""
    import torch

    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    q, r = torch.linalg.qr(wide.t())
    # The factor is unique once the diagonal of r is positive, and so differentiable.
    return (q * r.diagonal().sign()).t().to(matrix.dtype)

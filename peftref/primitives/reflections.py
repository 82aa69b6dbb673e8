"""A product of reflections."""

from __future__ import annotations

import math
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

__all__ = ["Reflections", "ReflectionsArguments"]


class ReflectionsArguments(Arguments):
    """``rank``: number of reflections, even so that they can cancel at first."""

    rank: int = Field(default=8, gt=0)
    share: str | None = None


@primitives.register("reflections")
class Reflections(Primitive[ReflectionsArguments]):
    """``f(x) = x H_r ... H_1``, ``H_i = I - 2 u_i u_i^T / (u_i^T u_i)``: ``W' = W H_1 ... H_r``.

    Rows ``u_1 = u_2``, ``u_3 = u_4``, ... at first, so that reflections cancel in pairs. They are
    applied one after the other; the product is never formed. HRA, Yuan et al. 2024,
    https://arxiv.org/abs/2405.17484
    """

    name = "reflections"
    Arguments = ReflectionsArguments

    def __init__(self, arguments: ReflectionsArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if arguments.rank % 2 or arguments.rank > place.d_in:
            raise CompositionError(
                f"reflections: rank is an even number up to the width {place.d_in}, not "
                f"{arguments.rank}; an odd number of reflections is never the identity"
            )

    def tensors(self) -> tuple[TensorSpec, ...]:
        rank = self.arguments.rank
        init = f"paired_uniform({math.sqrt(2 / rank)})"
        return (TensorSpec(self.label, (rank, self.place.d_in), init, share=self.arguments.share),)

    def algebra(self) -> Algebra:
        return Algebra(
            linear=True, matrix=True, orthogonal=True, identity_at_init=True, keeps_zero=True
        )

    def flops(self) -> int:
        return 4 * self.arguments.rank * self.place.d_in

    def matrix_flops(self) -> int:
        return self.flops() * self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import linear

        def reflect(x: Tensor, vectors: Tensor) -> Tensor:
            units = vectors / vectors.norm(dim=1, keepdim=True)
            for unit in reversed(units.split(1)):
                x = x - linear(linear(x, unit), 2 * unit.mT)
            return x

        return reflect

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        reflect = self.bind(runtime)

        def matrix(before: Tensor | None, vectors: Tensor) -> Tensor:
            if before is None:
                before = torch.eye(self.place.d_in, dtype=vectors.dtype, device=vectors.device)
            return reflect(before.mT, vectors).mT

        return matrix

"""A trained difference at few fixed positions of a weight."""

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

__all__ = ["Sparse", "SparseArguments"]


class SparseArguments(Arguments):
    """``rank``: as many values as LoRA of that rank has; ``seed``: of the positions."""

    rank: int = Field(default=32, gt=0)
    seed: int | None = Field(default=None, ge=0)


@primitives.register("sparse")
class Sparse(Primitive[SparseArguments]):
    """``W' = W + D``, ``D`` zero but at ``rank (d_out + d_in)`` positions drawn once.

    Values are zero at first. With a seed, sites of one shape have the same positions. SHiRA,
    Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175
    """

    name = "sparse"
    Arguments = SparseArguments

    def __init__(self, arguments: SparseArguments, place: Place) -> None:
        super().__init__(arguments, place)
        shape, size = place.port_shape, math.prod(place.port_shape)
        if self.count > size:
            raise CompositionError(
                f"sparse: rank {arguments.rank} means {self.count} values, but the tensor has "
                f"{size}; the highest rank is {size // sum(shape)}"
            )

    @property
    def count(self) -> int:
        """Number of trained values."""
        return self.arguments.rank * sum(self.place.port_shape)

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        total = math.prod(self.place.port_shape)
        return (
            TensorSpec(f"{self.label}.values", (self.count,), "zeros"),
            TensorSpec(f"{self.label}.positions", (self.count,), f"distinct({total})",
                       trainable=False, seed=self.arguments.seed),
        )

    def algebra(self) -> Algebra:
        return Algebra(source=True, zero_at_init=True, matrix=True)

    def matrix_flops(self) -> int:
        return self.count

    def bind(self, runtime: Runtime) -> Operation:
        shape, total = self.place.port_shape, math.prod(self.place.port_shape)

        def spread(values: Tensor, positions: Tensor) -> Tensor:
            return values.new_zeros(total).scatter(0, positions, values).view(shape)

        return spread

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return self.bind(runtime)

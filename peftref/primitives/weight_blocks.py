"""Square blocks that act on the blocks of the frozen weight itself."""

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

__all__ = ["WeightBlocks", "WeightBlocksArguments"]


class WeightBlocksArguments(Arguments):
    """``block``: side of a block; it divides both widths."""

    block: int = Field(default=64, gt=0)


@primitives.register("weight_blocks")
class WeightBlocks(Primitive[WeightBlocksArguments]):
    """``f(x) = x M^T``, ``M_ij = W0_ij D_i + D_i``, one block ``D_i`` for each row of blocks.

    Bone with weight-guided blocks (bat), Kang and Yin 2024, https://arxiv.org/abs/2409.15371
    """

    name = "weight_blocks"
    Arguments = WeightBlocksArguments
    reads_weight = True

    def __init__(self, arguments: WeightBlocksArguments, place: Place) -> None:
        super().__init__(arguments, place)
        for width in place.d_out, place.d_in:
            if width % arguments.block:
                raise CompositionError(
                    f"weight_blocks: block {arguments.block} does not divide width {width} of a "
                    "linear's weight; give a divisor of both widths"
                )

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        b = self.arguments.block
        return (TensorSpec(self.label, (self.place.d_out // b, b, b), "zeros"),)

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, stream=False, zero_at_init=True, keeps_zero=True)

    def matrix_flops(self) -> int:
        return 2 * self.place.d_in * self.place.d_out * self.arguments.block

    def bind(self, runtime: Runtime) -> Operation:
        return self.bind_matrix(runtime)

    def bind_matrix(self, runtime: Runtime) -> Operation:
        block = self.arguments.block

        def matrix(before: Tensor | None, blocks: Tensor) -> Tensor:
            weight = runtime.weight().to(blocks.dtype)
            # (rows of blocks, columns of blocks, block, block)
            parts = weight.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2)
            formed = parts @ blocks[:, None] + blocks[:, None]
            formed = formed.transpose(1, 2).flatten(2).flatten(0, 1)
            return formed if before is None else formed @ before

        return matrix

"""Block-diagonal linear map, trained."""

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

__all__ = ["BlockLinear", "BlockLinearArguments"]


class BlockLinearArguments(Arguments):
    """``out``: width of the result (default: the port's); ``blocks``: on the diagonal."""

    out: int | None = Field(default=None, gt=0)
    blocks: int = Field(default=2, gt=0)
    init: str = "kaiming_uniform"


@primitives.register("block_linear")
class BlockLinear(Primitive[BlockLinearArguments]):
    """``f(x) = x blockdiag(W_1, ...)^T`` with ``W`` (blocks, out / blocks, d_in / blocks).

    Kaiming's bound counts the inputs of one block, as of a linear of that size.
    """

    name = "block_linear"
    Arguments = BlockLinearArguments

    def __init__(self, arguments: BlockLinearArguments, place: Place) -> None:
        super().__init__(arguments, place)
        for width in (place.d_in, self.width):
            if width % arguments.blocks:
                raise CompositionError(
                    f"block_linear: {arguments.blocks} blocks do not divide width {width}; give "
                    f"a divisor of {math.gcd(place.d_in, self.width)}"
                )

    @property
    def width(self) -> int:
        return self.arguments.out or self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        n = self.arguments.blocks
        shape = (n, self.width // n, self.place.d_in // n)
        return (TensorSpec(f"{self.label}.weight", shape, self.arguments.init),)

    def algebra(self) -> Algebra:
        zero = self.arguments.init == "zeros"
        return Algebra(linear=True, matrix=True, zero_at_init=zero, keeps_zero=True)

    def flops(self) -> int:
        return 2 * self.place.d_in * self.width // self.arguments.blocks

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        blocks = self.arguments.blocks

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            parts = x.unflatten(-1, (blocks, -1))
            return torch.einsum("...gi,goi->...go", parts, weight).flatten(-2)

        return apply

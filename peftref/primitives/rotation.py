"""Block-diagonal rotation through the Cayley transform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftref.errors import CompositionError
from peftref.ir.primitive import (
    Algebra,
    Arguments,
    Link,
    Operation,
    Place,
    Primitive,
    Runtime,
    TensorSpec,
)
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rotation", "RotationArguments"]


class RotationArguments(Arguments):
    """``block``: width of a block, which divides the width that is rotated.

    ``block_share``: all blocks are one.
    """

    kind: Literal["block"] = "block"
    block: int = Field(default=32, gt=1)
    block_share: bool = False
    share: str | None = None


@primitives.register("rotation")
class Rotation(Primitive[RotationArguments]):
    """``f(x) = x R``, ``R = blockdiag(R_1, ...)``, ``R_i = (I - Q_i)(I + Q_i)^-1``, ``Q_i`` skew.

    The free entries are the upper triangles of ``Q_i``, zero at first: identity. The exact
    inverse is used, in float32, and not the truncated Neumann series, which is only
    approximately orthogonal. OFT, Qiu et al. 2023, https://arxiv.org/abs/2306.07280
    """

    name = "rotation"
    Arguments = RotationArguments

    def __init__(self, arguments: RotationArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if place.d_in % arguments.block:
            raise CompositionError(
                f"rotation: block {arguments.block} does not divide width {place.d_in}; "
                f"valid blocks: {', '.join(map(str, _divisors(place.d_in)))}"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.place.d_in // self.arguments.block

    def tensors(self) -> tuple[TensorSpec, ...]:
        b = self.arguments.block
        shape = (1 if self.arguments.block_share else self.blocks, b * (b - 1) // 2)
        return (TensorSpec(self.label, shape, "zeros", share=self.arguments.share),)

    def algebra(self) -> Algebra:
        return Algebra(
            linear=True, matrix=True, orthogonal=True, identity_at_init=True, keeps_zero=True
        )

    @property
    def link(self) -> Link:
        return Link("rotate")

    def flops(self) -> int:
        return 2 * self.place.d_in * self.arguments.block

    def matrix_flops(self) -> int:
        return self.blocks * 2 * self.arguments.block**3

    def _blocks(self, entries: Tensor) -> Tensor:
        import torch

        b = self.arguments.block
        entries = entries.expand(self.blocks, -1)
        rows, columns = torch.triu_indices(b, b, 1, device=entries.device)
        wide = entries.to(torch.promote_types(entries.dtype, torch.float32))
        upper = wide.new_zeros(self.blocks, b * b).index_copy(1, rows * b + columns, wide)
        upper = upper.unflatten(1, (b, b))
        eye = torch.eye(b, dtype=wide.dtype, device=wide.device)
        # (I - Q)(I + Q)^-1 = 2 (I + Q)^-1 - I, whose gradient is two products and no solve. It
        # always exists, so nothing is checked: a check would wait for the GPU.
        inverse = torch.linalg.inv_ex(eye + upper - upper.mT).inverse
        return (2 * inverse - eye).to(entries.dtype)

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        b, blocks = self.arguments.block, self.blocks

        def rotate(x: Tensor, entries: Tensor) -> Tensor:
            parts = x.unflatten(-1, (blocks, b))
            return torch.einsum("...nb,nbc->...nc", parts, self._blocks(entries)).flatten(-2)

        return rotate

    def bind_operand(self) -> Operation:
        return self._blocks

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        def matrix(before: Tensor | None, entries: Tensor) -> Tensor:
            # x R has the matrix R^T.
            transposed = self._blocks(entries).mT
            if before is None:
                return torch.block_diag(*transposed)
            parts = before.unflatten(0, (self.blocks, self.arguments.block))
            return (transposed @ parts).flatten(0, 1)

        return matrix


def _divisors(width: int) -> list[int]:
    return [b for b in range(2, width + 1) if width % b == 0]

"""A product of block-diagonal rotations in permuted coordinates."""

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

__all__ = ["Butterfly", "ButterflyArguments"]


class ButterflyArguments(Arguments):
    """``block``: width of a block; ``factors``: rotations in the product, one is OFT."""

    block: int = Field(default=4, gt=1)
    factors: int = Field(default=2, gt=0)
    share: str | None = None


@primitives.register("butterfly")
class Butterfly(Primitive[ButterflyArguments]):
    """``f(x) = x R_m ... R_1``, ``R_i = P_i blockdiag(R_i1, ...) P_i^T``.

    ``P_i`` sorts the half blocks inside each ``2^(i-1)`` blocks: even ones first. Blocks are
    Cayley transforms ``(I - Q)(I + Q)^-1`` of skew matrices whose upper triangles are the free
    entries, zero at first: identity. BOFT, Liu et al. 2023, https://arxiv.org/abs/2311.06243
    """

    name = "butterfly"
    Arguments = ButterflyArguments

    def __init__(self, arguments: ButterflyArguments, place: Place) -> None:
        super().__init__(arguments, place)
        b, m, d = arguments.block, arguments.factors, place.d_in
        if d % (b * 2 ** (m - 1)) or (m > 1 and b % 2):
            raise CompositionError(
                f"butterfly: {m} factors of blocks of {b} need a width that {b * 2 ** (m - 1)} "
                f"divides{' and an even block' if m > 1 else ''}; the width is {d}"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks in each factor."""
        return self.place.d_in // self.arguments.block

    def tensors(self) -> tuple[TensorSpec, ...]:
        a = self.arguments
        shape = (a.factors, self.blocks, a.block * (a.block - 1) // 2)
        return (TensorSpec(self.label, shape, "zeros", share=a.share),)

    def algebra(self) -> Algebra:
        return Algebra(
            linear=True, matrix=True, orthogonal=True, identity_at_init=True, keeps_zero=True
        )

    def flops(self) -> int:
        return 2 * self.arguments.factors * self.place.d_in * self.arguments.block

    def matrix_flops(self) -> int:
        return self.flops() * self.place.d_in

    def _rotations(self, entries: Tensor) -> Tensor:
        import torch

        b = self.arguments.block
        rows, columns = torch.triu_indices(b, b, 1, device=entries.device)
        wide = torch.promote_types(entries.dtype, torch.float32)
        place = torch.zeros(b, b, dtype=torch.long, device=entries.device)
        place[rows, columns] = torch.arange(len(rows), device=entries.device)
        upper = entries.to(wide)[..., place].triu(1)
        skew = upper - upper.mT
        eye = torch.eye(b, dtype=wide, device=entries.device)
        return torch.linalg.solve(eye + skew, eye - skew).to(entries.dtype)

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        b, blocks, factors = self.arguments.block, self.blocks, self.arguments.factors

        def rotate(x: Tensor, entries: Tensor) -> Tensor:
            rotations = self._rotations(entries)
            for index in reversed(range(factors)):
                span = (2**index, b // 2) if index else (1, b)
                halves = 2 if index else 1
                # x P: the inverse of what P does to a column.
                parts = x.unflatten(-1, (-1, halves, *span)).transpose(-3, -2)
                blocked = parts.flatten(-4).unflatten(-1, (blocks, b))
                turned = torch.einsum("...nb,nbc->...nc", blocked, rotations[index]).flatten(-2)
                back = turned.unflatten(-1, (-1, span[0], halves, span[1])).transpose(-3, -2)
                x = back.flatten(-4)
            return x

        return rotate

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        rotate = self.bind(runtime)

        def matrix(before: Tensor | None, entries: Tensor) -> Tensor:
            if before is None:
                before = torch.eye(self.place.d_in, dtype=entries.dtype, device=entries.device)
            return rotate(before.mT, entries).mT

        return matrix

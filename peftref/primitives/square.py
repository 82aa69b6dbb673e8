"""A square matrix between a compression and a decompression without tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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

__all__ = ["Square", "SquareArguments"]


class SquareArguments(Arguments):
    """``rank``: of the low-rank pair with as many numbers; ``kind``: sum of groups, or rotated."""

    rank: int = Field(default=8, gt=0)
    kind: Literal["sum", "rotate"] = "rotate"


@primitives.register("square")
class Square(Primitive[SquareArguments]):
    """``f(x) = decompress(M compress(x))``, ``M`` (q, q), ``q = round(sqrt((d_in + d_out) r))``.

    ``x`` is filled up from its front to groups of ``q``. ``sum``: the groups are added up, the
    result repeated. ``rotate``: entries i and i + q/2 of group g are turned by
    ``g 10000^(-2i/q)``, ``M`` is applied to every group, and the groups stand side by side (q is
    even here). Types 1 and 6 of MoRA, Jiang et al. 2024, https://arxiv.org/abs/2405.12130
    """

    name = "square"
    Arguments = SquareArguments

    def __init__(self, arguments: SquareArguments, place: Place) -> None:
        super().__init__(arguments, place)
        side = int(((place.d_in + place.d_out) * arguments.rank) ** 0.5 + 0.5)
        self.side = side // 2 * 2 if arguments.kind == "rotate" else side
        if self.side > place.d_in:
            raise CompositionError(
                f"square: rank {arguments.rank} asks for a square of side {self.side}, above the "
                f"{place.d_in} entries that it reads; lower the rank"
            )

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.label, (self.side, self.side), "zeros"),)

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, zero_at_init=True, keeps_zero=True)

    @property
    def _groups(self) -> int:
        return -(-self.place.d_in // self.side)

    def flops(self) -> int:
        groups = self._groups if self.arguments.kind == "rotate" else 1
        return 2 * self.side * self.side * groups

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn.functional import linear

        q, groups, out = self.side, self._groups, self.place.d_out
        missing, rotates = groups * q - self.place.d_in, self.arguments.kind == "rotate"

        def turned(parts: Tensor) -> Tensor:
            speed = 10000 ** (-torch.arange(0, q, 2, device=parts.device) / q)
            angle = torch.outer(torch.arange(groups, device=parts.device), speed)
            cos, sin = angle.cos().to(parts.dtype), angle.sin().to(parts.dtype)
            first, second = parts.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

        def apply(x: Tensor, square: Tensor) -> Tensor:
            parts = torch.cat((x, x[..., :missing]), -1).unflatten(-1, (groups, q))
            parts = turned(parts) if rotates else parts.sum(-2, keepdim=True)
            y = linear(parts, square).flatten(-2)
            times = -(-out // y.shape[-1])
            return y.repeat(*[1] * (y.dim() - 1), times)[..., :out]

        return apply

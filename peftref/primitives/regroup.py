"""Linear maps without tensors: entries are added up in groups, repeated or moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftref.errors import CompositionError
from peftref.ir.primitive import Algebra, Arguments, Operation, Place, Primitive, Runtime
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fold", "FoldArguments", "GroupArguments", "Pool", "Shuffle", "Tile", "TileArguments"]

_LINEAR = Algebra(linear=True, matrix=True, keeps_zero=True)


class FoldArguments(Arguments):
    """``width``: of a group, or ``groups``: how many; ``pad``: how the last one is filled up."""

    groups: int | None = Field(default=None, gt=0)
    width: int = Field(default=64, gt=0)
    pad: Literal["zeros", "wrap"] = "zeros"


@primitives.register("fold")
class Fold(Primitive[FoldArguments]):
    """``f(x) = sum_g x_g`` over consecutive groups ``x_g`` of ``width`` entries.

    MiSS, Kang and Yin 2024, https://arxiv.org/abs/2409.15371
    """

    name = "fold"
    Arguments = FoldArguments

    def __init__(self, arguments: FoldArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if arguments.groups is not None and place.d_in % arguments.groups:
            raise CompositionError(
                f"fold: {arguments.groups} groups do not divide the {place.d_in} entries it reads"
            )
        if self.width > place.d_in:
            raise CompositionError(
                f"fold: width {self.width} is above the {place.d_in} entries that it reads"
            )

    @property
    def width(self) -> int:
        groups = self.arguments.groups
        return self.arguments.width if groups is None else self.place.d_in // groups

    def algebra(self) -> Algebra:
        return _LINEAR

    def flops(self) -> int:
        return self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        width = self.width
        missing, wraps = -self.place.d_in % width, self.arguments.pad == "wrap"

        def fold(x: Tensor) -> Tensor:
            if missing:
                filler = x[..., :missing]
                filler = filler if wraps else torch.zeros_like(filler)
                x = torch.cat((x, filler), -1)
            return x.unflatten(-1, (-1, width)).sum(-2)

        return fold


class GroupArguments(Arguments):
    """``group``: entries of a group, or groups; it must divide what is read."""

    group: int = Field(default=16, gt=0)


class _Grouped(Primitive[GroupArguments]):
    Arguments = GroupArguments

    def __init__(self, arguments: GroupArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if not place.d_in or place.d_in % arguments.group:
            raise CompositionError(
                f"{self.name}: {arguments.group} does not divide width {place.d_in}; give a "
                "divisor of it"
            )

    def algebra(self) -> Algebra:
        return _LINEAR


@primitives.register("pool")
class Pool(_Grouped):
    """``f(x)_j = sum of x_i in group j``: neighbours are added up, one number a group.

    QA-LoRA, Xu et al. 2023, https://arxiv.org/abs/2309.14717
    """

    name = "pool"

    @property
    def width(self) -> int:
        return self.place.d_in // self.arguments.group

    def flops(self) -> int:
        return self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        group = self.arguments.group

        def pool(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, group)).sum(-1)

        return pool


@primitives.register("shuffle")
class Shuffle(_Grouped):
    """``f(x)``: groups of blocks change places, ``(g, g, c) -> (g, g, c)`` transposed.

    ``group`` is ``g^2``'s root: each of ``g`` blocks hands one part to every block.
    GraLoRA, Jung et al. 2025, https://arxiv.org/abs/2505.20355
    """

    name = "shuffle"

    def __init__(self, arguments: GroupArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if place.d_in % arguments.group**2:
            raise CompositionError(
                f"shuffle: each of {arguments.group} blocks gives a part to every block, so "
                f"{arguments.group**2} must divide width {place.d_in}"
            )

    def algebra(self) -> Algebra:
        same = self.arguments.group == 1
        return Algebra(linear=True, matrix=True, keeps_zero=True, diagonal=same,
                       identity_at_init=same)

    def bind(self, runtime: Runtime) -> Operation:
        group = self.arguments.group

        def shuffle(x: Tensor) -> Tensor:
            return x.unflatten(-1, (group, group, -1)).transpose(-2, -3).flatten(-3)

        return shuffle


class TileArguments(Arguments):
    """``out``: width of the result (default: the port's)."""

    out: int | None = Field(default=None, gt=0)


@primitives.register("tile")
class Tile(Primitive[TileArguments]):
    """``f(x)_i = x_(i mod d)``: repeated, and cut at the end."""

    name = "tile"
    Arguments = TileArguments

    @property
    def width(self) -> int:
        return self.arguments.out or self.place.d_out

    def algebra(self) -> Algebra:
        return _LINEAR

    def bind(self, runtime: Runtime) -> Operation:
        width = self.width
        times = -(-width // self.place.d_in)

        def tile(x: Tensor) -> Tensor:
            return x.repeat(*[1] * (x.dim() - 1), times)[..., :width]

        return tile

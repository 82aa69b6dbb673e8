"""Rotation and scale of pairs of coordinates inside groups."""

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

__all__ = ["PairRotation", "PairRotationArguments"]


class PairRotationArguments(Arguments):
    """``group``: coordinates in a group; ``variant``: angles and scales for each pair.

    1: one angle and one scale; 2: one for each of its two outputs; 4: one for each of the four
    entries of its matrix.
    """

    group: int = Field(default=64, gt=1)
    variant: Literal[1, 2, 4] = 1
    share: str | None = None


@primitives.register("pair_rotation")
class PairRotation(Primitive[PairRotationArguments]):
    """``f(y) = a cos(t) * y + a sin(t) * rot(y)``, ``rot(y1, y2) = (-y2, y1)`` in each group.

    The first half of a group is paired with its second half. ``t`` is zero and ``a`` one at
    first: identity; a scaled rotation with variant 1, any 2 x 2 matrix with the others. RoAd, Liao
    and Monz 2024, https://arxiv.org/abs/2409.00119
    """

    name = "pair_rotation"
    Arguments = PairRotationArguments

    def __init__(self, arguments: PairRotationArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if arguments.group % 2 or place.d_in % arguments.group:
            even = [g for g in range(2, place.d_in + 1, 2) if place.d_in % g == 0]
            raise CompositionError(
                f"pair_rotation: group {arguments.group} is to be even and to divide the width "
                f"{place.d_in}; valid: {', '.join(map(str, even)) or 'none'}"
            )

    def tensors(self) -> tuple[TensorSpec, ...]:
        a = self.arguments
        size = self.place.d_in * a.variant // 2
        return (
            TensorSpec(f"{self.label}.angle", (size,), "zeros", share=a.share),
            TensorSpec(f"{self.label}.scale", (size,), "ones", share=a.share),
        )

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, identity_at_init=True, keeps_zero=True)

    def flops(self) -> int:
        return 3 * self.place.d_in

    def _columns(self, angle: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What ``y`` and ``rot(y)`` are multiplied by, each (d)."""
        half = self.arguments.group // 2
        if self.arguments.variant == 1:
            angle, scale = (t.unflatten(0, (-1, 1, half)).expand(-1, 2, -1).flatten()
                            for t in (angle, scale))
        if self.arguments.variant == 4:
            first, second = angle.unflatten(0, (-1, 2, 2 * half)).unbind(1)
            one, other = scale.unflatten(0, (-1, 2, 2 * half)).unbind(1)
            return (one * first.cos()).flatten(), (other * second.sin()).flatten()
        return scale * angle.cos(), scale * angle.sin()

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        half = self.arguments.group // 2

        def rotate(y: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
            own, other = self._columns(angle, scale)
            first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
            return own * y + other * torch.stack((-second, first), -2).flatten(-3)

        return rotate

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        rotate = self.bind(runtime)

        def matrix(before: Tensor | None, angle: Tensor, scale: Tensor) -> Tensor:
            if before is None:
                before = torch.eye(self.place.d_in, dtype=angle.dtype, device=angle.device)
            return rotate(before.mT, angle, scale).mT

        return matrix

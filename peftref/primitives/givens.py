"""Plane rotations on a tree of coordinate pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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

__all__ = ["Givens", "GivensArguments"]


class GivensArguments(Arguments):
    """``kind``: ``angle``, one angle a pair; ``free``, any 2 x 2 matrix a pair."""

    kind: Literal["angle", "free"] = "angle"
    share: str | None = None


@primitives.register("givens")
class Givens(Primitive[GivensArguments]):
    """``f(x) = x P_1 P_2 ... P_m``, ``m = ceil(log2 d)``, each ``P_r`` of disjoint pairs.

    ``P_r`` acts on the pairs ``(i, i + 2^(r-1))``, ``i`` a multiple of ``2^r``; a coordinate that
    has no partner is left alone. Every coordinate but the first is the second of one pair, so
    there are ``d - 1`` pairs whatever ``d`` is, ordered by their second coordinate. With angles,
    ``x_i' = c x_i + s x_j`` and ``x_j' = c x_j - s x_i``; free matrices ``[[a, b], [c, d]]``,
    the identity at first, give ``x_i' = a x_i + c x_j`` and ``x_j' = b x_i + d x_j``: columns
    ``(a, c)`` and ``(b, d)``. GOFT and qGOFT, Ma et al. 2024, https://arxiv.org/abs/2404.04316
    """

    name = "givens"
    Arguments = GivensArguments

    def __init__(self, arguments: GivensArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if place.d_in < 2:
            raise CompositionError(f"givens: width {place.d_in} has no pair to rotate")

    def tensors(self) -> tuple[TensorSpec, ...]:
        a, pairs = self.arguments, self.place.d_in - 1
        if a.kind == "angle":
            return (TensorSpec(self.label, (pairs,), "zeros", share=a.share),)
        return (TensorSpec(self.label, (pairs, 2, 2), "eye", share=a.share),)

    def algebra(self) -> Algebra:
        return Algebra(
            linear=True, matrix=True, orthogonal=self.arguments.kind == "angle",
            identity_at_init=True, keeps_zero=True,
        )

    def flops(self) -> int:
        return 6 * (self.place.d_in - 1)

    def matrix_flops(self) -> int:
        return self.flops() * self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        def matrices(tensor: Tensor) -> Tensor:
            if self.arguments.kind == "free":
                return tensor
            cos, sin = tensor.cos(), tensor.sin()
            return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))

        def level(x: Tensor, pairs: Tensor) -> Tensor:
            """Rotate neighbours; the first of each pair goes on to the next level."""
            first, second = x[..., ::2], x[..., 1::2]
            own, rest = pairs[::2], pairs[1::2]
            count = second.shape[-1]
            head, alone = first[..., :count], first[..., count:]
            up = own[:, 0, 0] * head + own[:, 1, 0] * second
            down = own[:, 0, 1] * head + own[:, 1, 1] * second
            up = torch.cat((up, alone), -1)
            if up.shape[-1] > 1:
                up = level(up, rest)
            joined = torch.stack((up[..., :count], down), -1).flatten(-2)
            return torch.cat((joined, up[..., count:]), -1)

        return lambda x, tensor: level(x, matrices(tensor))

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        run = self.bind(runtime)

        def matrix(before: Tensor | None, tensor: Tensor) -> Tensor:
            if before is None:
                before = torch.eye(self.place.d_in, dtype=tensor.dtype, device=tensor.device)
            return run(before.mT, tensor).mT

        return matrix

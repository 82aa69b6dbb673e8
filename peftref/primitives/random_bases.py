"""Full-rank map from frozen random bases."""

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

__all__ = ["RandomBases", "RandomBasesArguments"]


class RandomBasesArguments(Arguments):
    """``rank``: of one basis; ``share``: name of the frozen bases, one pair for all sites."""

    rank: int = Field(default=32, gt=0)
    seed: int = 0
    share: str = "bases"


@primitives.register("random_bases")
class RandomBases(Primitive[RandomBasesArguments]):
    """``f(x) = x (sum_j B_j diag(l_j) A diag(g_j))^T``, ``j < N = ceil(min(d_in, d_out) / r)``.

    ``A`` (r, min) and ``B_j`` (max, r) are random, of variance one, and frozen; ``l`` (r, N) is
    zero at first and ``g`` (N, min) one over its longer side. The sum is transposed where
    ``d_in > d_out``, so that what is trained stands at the smaller side. RandLoRA,
    Albert et al. 2025, https://arxiv.org/abs/2502.00987
    """

    name = "random_bases"
    Arguments = RandomBasesArguments

    def __init__(self, arguments: RandomBasesArguments, place: Place) -> None:
        super().__init__(arguments, place)
        self.small = min(place.d_in, place.d_out)
        self.large = max(place.d_in, place.d_out)
        if not 0 < arguments.rank <= self.small:
            raise CompositionError(
                f"random_bases: rank {arguments.rank} is above the smaller width {self.small}"
            )
        self.bases = -(-self.small // arguments.rank)

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        a, n, label = self.arguments, self.bases, self.label
        shapes = {"small": (a.rank, self.small), "large": (self.large, n, a.rank)}
        frozen = [
            TensorSpec(
                f"{label}.{name}", shape, "uniform(1.7320508)", trainable=False,
                seed=a.seed + index, share=a.share, sliced=True,
            )
            for index, (name, shape) in enumerate(shapes.items())
        ]
        gamma = f"constant({1 / max(n, self.small)})"
        return (
            *frozen,
            TensorSpec(f"{label}.lambda", (a.rank, n), "zeros"),
            TensorSpec(f"{label}.gamma", (n, self.small), gamma),
        )

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, zero_at_init=True, keeps_zero=True)

    def flops(self) -> int:
        return 2 * self.bases * self.arguments.rank * (self.small + self.large)

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn.functional import linear

        transposed = self.place.d_in > self.place.d_out

        def apply(
            x: Tensor, small: Tensor, large: Tensor, inner: Tensor, outer: Tensor
        ) -> Tensor:
            # (N, r, min): every basis with its two scales.
            down = torch.einsum("rn,rm,nm->nrm", inner, small, outer).flatten(0, 1)
            up = large.flatten(1)
            if transposed:
                return linear(linear(x, up.mT), down.mT)
            return linear(linear(x, down), up)

        return apply

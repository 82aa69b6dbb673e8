"""The mean over the tokens of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MeanTokens"]


@primitives.register("mean_tokens")
class MeanTokens(Primitive[Arguments]):
    """``f(x)_t = mean over real tokens u of x_u``, the same for every token of a row.

    Padding is left out, so that a padded row equals the row alone.
    """

    name = "mean_tokens"

    def algebra(self) -> Algebra:
        return Algebra(keeps_zero=True, mixes_tokens=True, per_sample=True)

    def flops(self) -> int:
        return self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        stack = self.place.stack

        def mean(x: Tensor) -> Tensor:
            mask = runtime.token_mask(stack)
            if mask is None:
                return x.mean(-2, keepdim=True).expand_as(x)
            real = mask.to(x.dtype)[..., None]
            total = (x * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
            return total.expand_as(x)

        return mean

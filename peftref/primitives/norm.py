"""Normalisation over the features, with its own trained scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Norm", "NormArguments"]


class NormArguments(Arguments):
    """``kind``: layer norm (scale and shift) or root-mean-square norm (scale)."""

    kind: Literal["layer", "rms"] = "layer"
    epsilon: float = 1e-5


@primitives.register("norm")
class Norm(Primitive[NormArguments]):
    """Layer norm ``g * (x - mean) / sqrt(var + eps) + b``, or RMS norm ``g * x / rms(x)``."""

    name = "norm"
    Arguments = NormArguments

    def tensors(self) -> tuple[TensorSpec, ...]:
        weight = TensorSpec(f"{self.label}.weight", (self.place.d_in,), "ones")
        if self.arguments.kind == "rms":
            return (weight,)
        return weight, TensorSpec(f"{self.label}.bias", (self.place.d_in,), "zeros")

    def algebra(self) -> Algebra:
        return Algebra(keeps_zero=True)

    def flops(self) -> int:
        return 8 * self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn import functional

        shape, epsilon = (self.place.d_in,), self.arguments.epsilon
        if self.arguments.kind == "rms":

            def rms(x: Tensor, weight: Tensor) -> Tensor:
                return functional.rms_norm(x, shape, weight, epsilon)

            return rms

        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.layer_norm(x, shape, weight, bias, epsilon)

        return layer

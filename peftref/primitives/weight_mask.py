"""A trained binary mask over the frozen weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.pruning.straight_through import threshold
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WeightMask", "WeightMaskArguments"]


class WeightMaskArguments(Arguments):
    """``init``: of the scores; ``threshold``: the least score that keeps a weight."""

    init: str = "uniform(0.01)"
    threshold: float = 0.0


@primitives.register("weight_mask")
class WeightMask(Primitive[WeightMaskArguments]):
    """``f(W) = W * 1[S >= threshold]``; the scores get the gradient of a real mask, ``W dL/dW'``.

    Zhao et al. 2020, https://arxiv.org/abs/2004.12406
    """

    name = "weight_mask"
    Arguments = WeightMaskArguments

    @property
    def label(self) -> str:
        return self.arguments.name or "scores"

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.label, self.place.port_shape, self.arguments.init),)

    def algebra(self) -> Algebra:
        return Algebra(matrix=True, base=True, stream=False)

    def matrix_flops(self) -> int:
        return 2 * self.place.port_shape[0] * self.place.port_shape[1]

    def bind(self, runtime: Runtime) -> Operation:
        def mask(weight: Tensor, scores: Tensor) -> Tensor:
            return weight * threshold(scores, self.arguments.threshold)

        return mask

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return self.bind(runtime)

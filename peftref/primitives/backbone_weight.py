"""The frozen weight of the site itself, as a factor or a map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.errors import CompositionError
from peftref.ir.primitive import Algebra, Arguments, Operation, Place, Primitive, Runtime
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BackboneWeight"]


@primitives.register("backbone_weight")
class BackboneWeight(Primitive[Arguments]):
    """``f(x) = x W0^T`` with the frozen weight at the site; it has no tensors of its own.

    HiRA, Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS
    """

    name = "backbone_weight"
    reads_weight = True

    def __init__(self, arguments: Arguments, place: Place) -> None:
        super().__init__(arguments, place)
        if place.port_shape and place.port_shape != (place.d_out, place.d_in):
            raise CompositionError(
                "backbone_weight: must be the first function at a linear, reading its input"
            )

    @property
    def width(self) -> int:
        return self.place.d_out

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, keeps_zero=True)

    def flops(self) -> int:
        return 2 * self.place.d_in * self.place.d_out

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import linear

        def apply(x: Tensor) -> Tensor:
            return linear(x, runtime.weight().to(x.dtype))

        return apply

    def bind_matrix(self, runtime: Runtime) -> Operation:
        def matrix(before: Tensor | None) -> Tensor:
            weight = runtime.weight()
            return weight if before is None else weight.to(before.dtype) @ before

        return matrix

"""Scale of each row of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RowScale"]


@primitives.register("row_scale")
class RowScale(Primitive[Arguments]):
    """``f(W) = s * W`` with trained ``s`` (d_out, ones at first); the bias is not scaled.

    BOFT's scale, Liu et al. 2023, https://arxiv.org/abs/2311.06243
    """

    name = "row_scale"

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.label, (self.place.port_shape[0],), "ones"),)

    def algebra(self) -> Algebra:
        return Algebra(identity_at_init=True, matrix=True, stream=False)

    def matrix_flops(self) -> int:
        return self.place.port_shape[0] * self.place.port_shape[1]

    def bind(self, runtime: Runtime) -> Operation:
        """Return the row scale ``s`` from ``(W, s)``."""
        return lambda weight, scale: scale  # pyright: ignore[reportUnknownVariableType]

    def bind_matrix(self, runtime: Runtime) -> Operation:
        def matrix(weight: Tensor, scale: Tensor) -> Tensor:
            return scale[:, None] * weight

        return matrix

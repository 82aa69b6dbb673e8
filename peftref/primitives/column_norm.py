"""Direction and magnitude of a weight, apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Link, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ColumnNorm"]


@primitives.register("column_norm")
class ColumnNorm(Primitive[Arguments]):
    """``f(W) = m * W / ||W||``, the norm over each output neuron's inputs, detached.

    ``m`` (d_out) starts at the backbone weight's own norms. DoRA, Liu et al. 2024,
    https://arxiv.org/abs/2402.09353
    """

    name = "column_norm"

    @property
    def label(self) -> str:
        return self.arguments.name or "magnitude"

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.label, (self.place.port_shape[0],), "weight_norm"),)

    def algebra(self) -> Algebra:
        return Algebra(identity_at_init=True, matrix=True, stream=False)

    @property
    def link(self) -> Link:
        return Link("norm")

    def matrix_flops(self) -> int:
        return 3 * self.place.port_shape[0] * self.place.port_shape[1]

    def bind(self, runtime: Runtime) -> Operation:
        """Return the row scale ``m / ||W||`` from ``(W, m)``."""
        import torch

        def scale(weight: Tensor, magnitude: Tensor) -> Tensor:
            # Treated as a constant, as in the paper's section 4.3: the gradient of the norm
            # costs a full weight gradient and changes little.
            wide = torch.promote_types(weight.dtype, torch.float32)
            norm = weight.detach().to(wide).norm(dim=1)
            return magnitude / norm.to(magnitude.dtype)

        return scale

    def bind_matrix(self, runtime: Runtime) -> Operation:
        scale = self.bind(runtime)

        def matrix(weight: Tensor, magnitude: Tensor) -> Tensor:
            return scale(weight, magnitude)[:, None] * weight

        return matrix

"""Added vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Bias", "BiasArguments"]


class BiasArguments(Arguments):
    """``init``: initialiser of the vector."""

    init: str = "zeros"


@primitives.register("bias")
class Bias(Primitive[BiasArguments]):
    """``f(x) = x + b`` with trained ``b`` (d)."""

    name = "bias"
    Arguments = BiasArguments

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.label, (self.place.d_in,), self.arguments.init),)

    def algebra(self) -> Algebra:
        zero = self.arguments.init == "zeros"
        return Algebra(affine=True, matrix=True, identity_at_init=zero, keeps_zero=zero)

    def flops(self) -> int:
        return self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        return torch.add

    def bind_matrix(self, runtime: Runtime) -> Operation:
        """Return the matrix of its linear part, the identity."""
        import torch

        def matrix(before: Tensor | None, bias: Tensor) -> Tensor:
            eye = torch.eye(len(bias), dtype=bias.dtype, device=bias.device)
            return eye if before is None else before

        return matrix

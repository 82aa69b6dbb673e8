"""Elementwise scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Vector", "VectorArguments"]


class VectorArguments(Arguments):
    """``init``: ones leave the stream as it is; ``share``: one vector for all sites."""

    init: str = "ones"
    share: str | None = None


@primitives.register("vector")
class Vector(Primitive[VectorArguments]):
    """``f(x) = v * x`` with trained ``v`` (d)."""

    name = "vector"
    Arguments = VectorArguments

    def tensors(self) -> tuple[TensorSpec, ...]:
        a = self.arguments
        return (TensorSpec(self.label, (self.place.d_in,), a.init, share=a.share),)

    def algebra(self) -> Algebra:
        return Algebra(
            linear=True,
            matrix=True,
            diagonal=True,
            zero_at_init=self.arguments.init == "zeros",
            identity_at_init=self.arguments.init == "ones",
            keeps_zero=True,
        )

    def flops(self) -> int:
        return self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        return torch.mul

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        def matrix(before: Tensor | None, vector: Tensor) -> Tensor:
            return torch.diag(vector) if before is None else vector[:, None] * before

        return matrix

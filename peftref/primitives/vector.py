"""Elementwise scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Link, Operation, Primitive, Runtime, TensorSpec
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Vector", "VectorArguments"]


class VectorArguments(Arguments):
    """``init``: ones leave the stream as it is; ``share``: one vector for all sites.

    ``scalar``: one number for all entries; ``trainable`` false: it stays as it starts.
    """

    init: str = "ones"
    share: str | None = None
    scalar: bool = False
    trainable: bool = True


@primitives.register("vector")
class Vector(Primitive[VectorArguments]):
    """``f(x) = v * x`` with ``v`` (d), or (1)."""

    name = "vector"
    Arguments = VectorArguments

    def tensors(self) -> tuple[TensorSpec, ...]:
        a = self.arguments
        shape = (1,) if a.scalar else (self.place.d_in,)
        # A frozen vector is stored: it may start at values of a backbone that changes later.
        return (TensorSpec(self.label, shape, a.init, share=a.share, trainable=a.trainable,
                           buffer=not a.trainable),)

    def algebra(self) -> Algebra:
        return Algebra(
            linear=True,
            matrix=True,
            diagonal=True,
            zero_at_init=self.arguments.init == "zeros",
            identity_at_init=self.arguments.init == "ones",
            keeps_zero=True,
        )

    @property
    def link(self) -> Link | None:
        return None if self.arguments.scalar else Link("scale")

    def flops(self) -> int:
        return self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        return torch.mul

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        width = self.place.d_in

        def matrix(before: Tensor | None, vector: Tensor) -> Tensor:
            if before is None:
                return torch.diag(vector.expand(width))
            return vector[:, None] * before

        return matrix

"""Dropout on the activation form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftref.ir.primitive import Algebra, Arguments, Link, Operation, Primitive, Runtime
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dropout", "DropoutArguments"]


class DropoutArguments(Arguments):
    """``p``: share of the entries set to zero while training."""

    p: float = Field(default=0.0, ge=0.0, lt=1.0)


@primitives.register("dropout")
class Dropout(Primitive[DropoutArguments]):
    """``f(x) = mask * x / (1 - p)`` while training, ``x`` otherwise (its matrix form)."""

    name = "dropout"
    Arguments = DropoutArguments

    def algebra(self) -> Algebra:
        off = self.arguments.p == 0.0
        return Algebra(
            linear=True,
            matrix=True,
            diagonal=off,
            orthogonal=off,
            identity_at_init=off,
            keeps_zero=True,
            random=not off,
        )

    @property
    def link(self) -> Link:
        return Link("dropout", self.arguments.p)

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import dropout

        p = self.arguments.p

        def apply(x: Tensor) -> Tensor:
            return dropout(x, p, runtime.training) if p else x

        return apply

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return lambda before: before

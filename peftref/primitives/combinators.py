"""Combinators: how functions are put together. They have no tensors of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftref.primitives.base import Algebra, Arguments, Operation, Primitive, Runtime
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Chain", "Product", "Sum"]


@primitives.register("chain")
class Chain(Primitive[Arguments]):
    """``f_n(... f_1(x))``. The graph holds the links; this entry only names the combinator."""

    name = "chain"

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, identity_at_init=True, keeps_zero=True)

    def bind(self, runtime: Runtime) -> Operation:
        return lambda x: x


@primitives.register("sum")
class Sum(Primitive[Arguments]):
    """``f(x) + g(x) + ...``"""

    name = "sum"

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, keeps_zero=True)

    def flops(self) -> int:
        return self.place.d_out

    def bind(self, runtime: Runtime) -> Operation:
        def total(first: Tensor, *others: Tensor) -> Tensor:
            for other in others:
                first = first + other
            return first

        return total

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return self.bind(runtime)


@primitives.register("product")
class Product(Primitive[Arguments]):
    """Elementwise product of *matrices*: linear in the stream, without an activation form.

    LoHa: ``(B1 A1) * (B2 A2)``, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098
    """

    name = "product"

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, keeps_zero=True, stream=False)

    def matrix_flops(self) -> int:
        return self.place.d_in * self.place.d_out

    def bind(self, runtime: Runtime) -> Operation:
        return self.bind_matrix(runtime)

    def bind_matrix(self, runtime: Runtime) -> Operation:
        def product(first: Tensor, *others: Tensor) -> Tensor:
            for other in others:
                first = first * other
            return first

        return product

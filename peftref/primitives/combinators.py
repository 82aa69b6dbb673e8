"""Combinators: how functions are put together. They have no tensors of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peftref.ir.primitive import Algebra, Arguments, Operation, Primitive, Runtime
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Chain", "Product", "SinceStart", "Sum"]


@primitives.register("chain")
class Chain(Primitive[Arguments]):
    """``f_n(... f_1(x))``. The graph holds the links; this entry only names the combinator."""

    name = "chain"

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, identity_at_init=True, keeps_zero=True)

    def bind(self, runtime: Runtime) -> Operation:
        return lambda x: x

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return lambda before: before


@primitives.register("sum")
class Sum(Primitive[Arguments]):
    """The sum ``f(x) + g(x) + ...`` of its branches."""

    name = "sum"

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, keeps_zero=True)

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        return _combine(inputs, zero=all(f.zero_at_init for f in inputs))

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

    LoHa: ``(B1 A1) * (B2 A2)``, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098. Of
    learned rows (sources) it is the product of the rows, as MPT's ``P * (u v^T)``, Wang et al.
    2023, https://arxiv.org/abs/2303.02861.
    """

    name = "product"

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, keeps_zero=True, stream=False)

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        both = _combine(inputs, zero=any(f.zero_at_init for f in inputs))
        return replace(both, stream=both.source and both.stream)

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


@primitives.register("since_start")
class SinceStart(Primitive[Arguments]):
    """``f(x; theta) - f(x; theta_0)``: zero at first, wherever the tensors of ``f`` start.

    Of a part of the weight as first value only its change acts, and the backbone stays as it is
    (PiSSA, Meng et al. 2024, https://arxiv.org/abs/2404.02948).
    """

    name = "since_start"
    reads_start = True

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, keeps_zero=True)

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        return replace(_combine(inputs, zero=True), keeps_zero=True)

    def flops(self) -> int:
        return self.place.d_out

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        return torch.sub

    def bind_matrix(self, runtime: Runtime) -> Operation:
        return self.bind(runtime)


def _combine(inputs: tuple[Algebra, ...], *, zero: bool) -> Algebra:
    return Algebra(
        linear=all(f.linear for f in inputs),
        diagonal=all(f.diagonal for f in inputs),
        source=all(f.source for f in inputs),
        zero_at_init=zero,
        keeps_zero=all(f.keeps_zero for f in inputs),
        matrix=all(f.matrix for f in inputs),
        stream=all(f.stream for f in inputs),
        random=any(f.random for f in inputs),
        mixes_tokens=any(f.mixes_tokens for f in inputs),
        per_sample=any(f.per_sample for f in inputs),
    )

"""Kronecker product of two small matrices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from peftref.errors import CompositionError
from peftref.ir.primitive import (
    Algebra,
    Arguments,
    Operation,
    Place,
    Primitive,
    Runtime,
    TensorSpec,
)
from peftref.registry import primitives

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Kron", "KronArguments", "factorise"]


class KronArguments(Arguments):
    """``factor`` -1: the most square split; ``rank``: of factors that are decomposed, if any."""

    rank: int | None = Field(default=8, gt=0)
    factor: int = Field(default=-1, ge=-1)
    decompose_both: bool = False

    @field_validator("factor")
    @classmethod
    def _is_a_limit(cls, value: int) -> int:
        if value == 0:
            raise ValueError("a factor is at least 1, or -1 for the most square split")
        return value


def factorise(width: int, factor: int) -> tuple[int, int]:
    """Split ``width = a b``; ``a`` is ``factor`` where that divides ``width``, as in PEFT.

    Else ``a <= b`` with ``a`` as large as possible and at most ``factor``; ``factor`` -1 sets no
    limit, so that the split is the most square one.
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    limit = math.isqrt(width) if factor == -1 else min(math.isqrt(width), factor)
    a = max(a for a in range(1, limit + 1) if width % a == 0)
    return a, width // a


@primitives.register("kron")
class Kron(Primitive[KronArguments]):
    """``f(x) = x (C kron D)^T``, ``C`` (a, c), ``D`` (b, d), ``a b = d_out``, ``c d = d_in``.

    ``D``, and ``C`` with ``decompose_both``, is itself a product of rank ``rank`` where that is
    smaller than half its larger side. ``C`` is zero at first. LoKr, Yeh et al. 2023,
    https://arxiv.org/abs/2309.14859
    """

    name = "kron"
    Arguments = KronArguments

    def __init__(self, arguments: KronArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if not place.d_in:
            raise CompositionError("kron: this site has no input stream to read")
        self.a, self.b = factorise(place.d_out, arguments.factor)
        self.c, self.d = factorise(place.d_in, arguments.factor)

    @property
    def width(self) -> int:
        return self.place.d_out

    @property
    def _splits(self) -> tuple[bool, bool]:
        r = self.arguments.rank
        if r is None:
            return False, False
        first = self.arguments.decompose_both and r < max(self.a, self.c) / 2
        return first, r < max(self.b, self.d) / 2

    def tensors(self) -> tuple[TensorSpec, ...]:
        r, label = self.arguments.rank or 0, self.label
        split_c, split_d = self._splits
        left = (
            (
                TensorSpec(f"{label}.left_up", (self.a, r), "zeros"),
                TensorSpec(f"{label}.left_down", (r, self.c), "kaiming_uniform"),
            )
            if split_c
            else (TensorSpec(f"{label}.left", (self.a, self.c), "zeros"),)
        )
        right = (
            (
                TensorSpec(f"{label}.right_up", (self.b, r), "kaiming_uniform"),
                TensorSpec(f"{label}.right_down", (r, self.d), "kaiming_uniform"),
            )
            if split_d
            else (TensorSpec(f"{label}.right", (self.b, self.d), "kaiming_uniform"),)
        )
        return left + right

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, zero_at_init=True, keeps_zero=True)

    def flops(self) -> int:
        return 2 * (self.c * self.d * self.b + self.b * self.c * self.a)

    def matrix_flops(self) -> int:
        return self.place.d_in * self.place.d_out

    def _factors(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        parts = list(tensors)
        split_c, split_d = self._splits
        left = parts.pop(0) @ parts.pop(0) if split_c else parts.pop(0)
        right = parts.pop(0) @ parts.pop(0) if split_d else parts.pop(0)
        return left, right

    def bind(self, runtime: Runtime) -> Operation:
        def apply(x: Tensor, *tensors: Tensor) -> Tensor:
            left, right = self._factors(tensors)
            # With x as (c, d): (C kron D) x = C X D^T, two products with the small factors.
            return (left @ (x.unflatten(-1, (self.c, self.d)) @ right.mT)).flatten(-2)

        return apply

    def bind_matrix(self, runtime: Runtime) -> Operation:
        import torch

        def matrix(before: Tensor | None, *tensors: Tensor) -> Tensor:
            product = torch.kron(*self._factors(tensors))
            return product if before is None else product @ before

        return matrix

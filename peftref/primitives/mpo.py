"""Matrix-product operator: a chain of small tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

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

__all__ = ["Mpo", "MpoArguments"]

_SITES = 5  # tensors of the chain; the middle one holds most numbers


class MpoArguments(Arguments):
    """``bond``: largest width between two tensors of the chain."""

    bond: int = Field(default=8, gt=0)


@primitives.register("mpo")
class Mpo(Primitive[MpoArguments]):
    """``f(x) = x M^T``, ``M[i1..i5, j1..j5] = T1[i1, j1] ... T5[i5, j5]``, a matrix product.

    ``T_k`` is (b_(k-1), i_k, j_k, b_k) with ``prod i_k = d_out``, ``prod j_k = d_in``; the third is
    ``core``, which ``share`` can give to all layers. The last is zero at first. Liu et al. 2023,
    https://arxiv.org/abs/2303.16753
    """

    name = "mpo"
    Arguments = MpoArguments

    def __init__(self, arguments: MpoArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if not place.d_in:
            raise CompositionError("mpo: this site has no input stream to read")
        self.rows, self.columns = _factors(place.d_out), _factors(place.d_in)

    @property
    def width(self) -> int:
        return self.place.d_out

    @property
    def _bonds(self) -> tuple[int, ...]:
        sides = [i * j for i, j in zip(self.rows, self.columns, strict=True)]
        bonds = [1]
        for k in range(1, _SITES):
            left, right = 1, 1
            for index, side in enumerate(sides):
                left, right = (left * side, right) if index < k else (left, right * side)
            bonds.append(min(self.arguments.bond, left, right))
        return (*bonds, 1)

    def tensors(self) -> tuple[TensorSpec, ...]:
        bonds, found = self._bonds, list[TensorSpec]()
        names = ("first", "second", "core", "fourth", "fifth")
        for k, name in enumerate(names):
            shape = (bonds[k], self.rows[k], self.columns[k], bonds[k + 1])
            # Keeps the size of what goes through: as many terms are added up as are counted here.
            std = (bonds[k] * self.columns[k]) ** -0.5
            init = "zeros" if k == _SITES - 1 else f"normal({std})"
            found.append(TensorSpec(f"{self.label}.{name}", shape, init))
        return tuple(found)

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, zero_at_init=True, keeps_zero=True)

    def flops(self) -> int:
        total, rows, columns = 0, 1, self.place.d_in
        for k, bond in enumerate(self._bonds[:-1]):
            columns //= self.columns[k]
            after = self._bonds[k + 1]
            total += 2 * rows * columns * bond * self.columns[k] * self.rows[k] * after
            rows *= self.rows[k]
        return total

    def bind(self, runtime: Runtime) -> Operation:
        def apply(x: Tensor, *chain: Tensor) -> Tensor:
            # (batch, rows so far, columns to come, bond)
            value = x.reshape(-1, 1, x.shape[-1], 1)
            for tensor in chain:
                bond, rows, columns, after = tensor.shape
                parts = value.unflatten(2, (columns, -1)).transpose(2, 3).flatten(3)
                mixed = parts @ tensor.permute(2, 0, 1, 3).reshape(columns * bond, -1)
                value = mixed.unflatten(-1, (rows, after)).transpose(2, 3).flatten(1, 2)
            return value.reshape(*x.shape[:-1], -1)

        return apply

    def matrix_flops(self) -> int:
        total, entries = 0, 1
        for k, bond in enumerate(self._bonds[:-1]):
            own = self.rows[k] * self.columns[k]
            total += 2 * entries * bond * own * self._bonds[k + 1]
            entries *= own
        return total

    def bind_matrix(self, runtime: Runtime) -> Operation:
        def matrix(before: Tensor | None, *chain: Tensor) -> Tensor:
            # (rows so far, columns so far, bond): much less work than the stream of an identity.
            formed = chain[0].squeeze(0)
            for tensor in chain[1:]:
                joined = formed @ tensor.flatten(1)
                _, rows, columns, after = tensor.shape
                parts = joined.unflatten(-1, (rows, columns, after)).transpose(1, 2)
                formed = parts.flatten(2, 3).flatten(0, 1)
            formed = formed.squeeze(-1)
            return formed if before is None else formed @ before

        return matrix


def _factors(width: int) -> tuple[int, ...]:
    """Five factors of a width, as equal as its primes allow, the largest in the middle."""
    primes, rest, divisor = list[int](), width, 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor = divisor + 1 if divisor * divisor <= rest else max(rest, divisor + 1)
    factors = [1] * _SITES
    for prime in sorted(primes, reverse=True):
        smallest = factors.index(min(factors))
        factors[smallest] *= prime
    low, second, third, fourth, high = sorted(factors)
    return second, third, high, fourth, low

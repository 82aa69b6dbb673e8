"""Parameterised hypercomplex multiplication: a sum of Kronecker products."""

from __future__ import annotations

import math
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

__all__ = ["PhmLinear", "PhmLinearArguments"]


class PhmLinearArguments(Arguments):
    """``out``: width of the result (default: the port's); ``factor``: number ``k`` of products.

    ``rank`` 0: the second factors are whole matrices (PHM). ``share``: one ``rule`` for all sites
    and for all uses in the function (Compacter); none: one for each site.
    """

    out: int | None = Field(default=None, gt=0)
    factor: int = Field(default=4, gt=0)
    rank: int = Field(default=1, ge=0)
    bias: bool = False
    rule_init: str = "normal(0.0001)"
    init: str = "xavier_normal"
    share: str | None = None


@primitives.register("phm_linear")
class PhmLinear(Primitive[PhmLinearArguments]):
    """``f(x) = x W + b``, ``W = sum_i A_i kron (s_i t_i)`` of ``k`` products.

    ``A`` (k, k, k) is ``rule``, ``s`` (k, d_in / k, r) is ``left``, ``t`` (k, r, out / k) is
    ``right``; with rank 0 ``B`` (k, d_in / k, out / k) is ``weight``. ``W`` is never formed on
    the stream: ``r k (d_in + out) + r k^3`` multiply-adds. Compacter, Karimi Mahabadi et al. 2021,
    https://arxiv.org/abs/2106.04647
    """

    name = "phm_linear"
    Arguments = PhmLinearArguments

    def __init__(self, arguments: PhmLinearArguments, place: Place) -> None:
        super().__init__(arguments, place)
        for width in (place.d_in, self.width):
            if not width or width % arguments.factor:
                raise CompositionError(
                    f"phm_linear: factor {arguments.factor} does not divide width {width}; give "
                    f"a divisor of {math.gcd(place.d_in, self.width)}"
                )

    @property
    def width(self) -> int:
        return self.arguments.out or self.place.d_out

    @property
    def _parts(self) -> tuple[int, int]:
        k = self.arguments.factor
        return self.place.d_in // k, self.width // k

    def tensors(self) -> tuple[TensorSpec, ...]:
        a, label = self.arguments, self.label
        k, (p, q) = a.factor, self._parts
        # One name for every use, so that the two projections of an adapter can share it.
        name = f"{label}.rule" if a.share is None else "rule"
        found = [TensorSpec(name, (k, k, k), a.rule_init, share=a.share)]
        if a.rank:
            found.append(TensorSpec(f"{label}.left", (k, p, a.rank), a.init))
            found.append(TensorSpec(f"{label}.right", (k, a.rank, q), a.init))
        else:
            found.append(TensorSpec(f"{label}.weight", (k, p, q), a.init))
        if a.bias:
            found.append(TensorSpec(f"{label}.bias", (self.width,), "zeros"))
        return tuple(found)

    def algebra(self) -> Algebra:
        a = self.arguments
        return Algebra(
            linear=not a.bias,
            matrix=not a.bias,
            zero_at_init="zeros" in (a.init, a.rule_init),
            keeps_zero=True,
        )

    def flops(self) -> int:
        k, r, (_, q) = self.arguments.factor, self.arguments.rank, self._parts
        if r:
            return 2 * k * r * (self.place.d_in + k * k + self.width)
        return 2 * k * (self.place.d_in * q + k * k * q)

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        k, low = self.arguments.factor, bool(self.arguments.rank)

        def apply(x: Tensor, rule: Tensor, *rest: Tensor) -> Tensor:
            parts = x.unflatten(-1, (k, -1))
            if low:
                narrow = torch.einsum("...ap,ipr->...iar", parts, rest[0])
                turned = torch.einsum("...iar,iab->...ibr", narrow, rule)
                y = torch.einsum("...ibr,irq->...bq", turned, rest[1])
            else:
                wide = torch.einsum("...ap,ipq->...iaq", parts, rest[0])
                y = torch.einsum("...iaq,iab->...bq", wide, rule)
            y = y.flatten(-2)
            return y + rest[-1] if self.arguments.bias else y

        return apply

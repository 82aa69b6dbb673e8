"""Linear map whose weight is put together from a shared bank of vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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

__all__ = ["BankLinear", "BankLinearArguments"]


class BankLinearArguments(Arguments):
    """``vectors`` of ``length`` in the bank ``share``, ``topk`` of them mixed for each part.

    ``along``: whether a vector is a part of a row (inputs) or of a column (outputs) of the weight.
    """

    out: int | None = Field(default=None, gt=0)
    vectors: int = Field(default=256, gt=0)
    length: int = Field(default=256, gt=0)
    topk: int = Field(default=2, gt=0)
    along: Literal["inputs", "outputs"] = "inputs"
    logits_init: str = "normal(0.1)"
    init: str = "uniform(0.02)"
    share: str = "bank"


@primitives.register("bank_linear")
class BankLinear(Primitive[BankLinearArguments]):
    """``f(x) = x W^T``; each part of ``W`` is ``sum_k softmax(top-k logits)_k bank_k``.

    The indices of the largest logits are no map that a gradient follows; their weights are.
    VB-LoRA, Li et al. 2024, https://arxiv.org/abs/2405.15179
    """

    name = "bank_linear"
    Arguments = BankLinearArguments

    def __init__(self, arguments: BankLinearArguments, place: Place) -> None:
        super().__init__(arguments, place)
        side = place.d_in if arguments.along == "inputs" else self.width
        if side % arguments.length:
            raise CompositionError(
                f"bank_linear: vectors of length {arguments.length} do not divide width {side}"
            )
        if arguments.topk > arguments.vectors:
            raise CompositionError(
                f"bank_linear: topk {arguments.topk} of {arguments.vectors} vectors; lower topk"
            )

    @property
    def width(self) -> int:
        return self.arguments.out or self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        a = self.arguments
        parts = (self.width, self.place.d_in // a.length)
        if a.along == "outputs":
            parts = (self.width // a.length, self.place.d_in)
        return (
            TensorSpec("bank", (a.vectors, a.length), a.init, share=a.share),
            TensorSpec(f"{self.label}.logits", (*parts, a.vectors), a.logits_init),
        )

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, keeps_zero=True)

    def flops(self) -> int:
        return 2 * self.place.d_in * self.width

    def bind(self, runtime: Runtime) -> Operation:
        from torch.nn.functional import linear

        topk, inputs = self.arguments.topk, self.arguments.along == "inputs"

        def apply(x: Tensor, bank: Tensor, logits: Tensor) -> Tensor:
            best, index = logits.topk(topk, dim=-1)
            parts = (best.softmax(-1)[..., None] * bank[index]).sum(-2)
            weight = parts.flatten(1) if inputs else parts.transpose(1, 2).flatten(0, 1)
            return linear(x, weight)

        return apply

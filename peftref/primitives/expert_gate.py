"""Learned weights of experts, the same for every sample of a task."""

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

__all__ = ["ExpertGate", "ExpertGateArguments"]


class ExpertGateArguments(Arguments):
    """``experts``: equal parts of what is read; ``task``: width of the task's embedding."""

    experts: int = Field(default=8, gt=0)
    task: int = Field(default=64, gt=0)


@primitives.register("expert_gate")
class ExpertGate(Primitive[ExpertGateArguments]):
    """``f(x) = (w_1 x_1, ..., w_E x_E)``, ``w = softmax(G t)`` with a trained task embedding ``t``.

    The gate reads the task and no sample, so it is a fixed scale for each expert once trained.
    MOELoRA, Liu et al. 2023, https://arxiv.org/abs/2310.18339
    """

    name = "expert_gate"
    Arguments = ExpertGateArguments

    def __init__(self, arguments: ExpertGateArguments, place: Place) -> None:
        super().__init__(arguments, place)
        if place.d_in % arguments.experts:
            raise CompositionError(
                f"expert_gate: {arguments.experts} experts do not divide {place.d_in} entries; "
                "the total rank is a multiple of the experts"
            )

    def tensors(self) -> tuple[TensorSpec, ...]:
        a, label = self.arguments, self.label
        return (
            TensorSpec(f"{label}.task", (a.task,), "normal(1.0)"),
            TensorSpec(f"{label}.gate", (a.experts, a.task), "kaiming_uniform"),
        )

    def algebra(self) -> Algebra:
        return Algebra(linear=True, matrix=True, diagonal=True, keeps_zero=True)

    def flops(self) -> int:
        return self.place.d_in

    def bind(self, runtime: Runtime) -> Operation:
        part = self.place.d_in // self.arguments.experts

        def apply(x: Tensor, task: Tensor, gate: Tensor) -> Tensor:
            return x * (gate * task).sum(1).softmax(0).repeat_interleave(part)

        return apply

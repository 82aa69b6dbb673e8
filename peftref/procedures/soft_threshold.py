"""Values that are pulled to zero, and stay there when they reach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from peftref.ir.primitive import TensorSpec
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.procedures.triplets import check_ranks, triplets
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SoftThreshold", "SoftThresholdArguments", "shrink"]


class SoftThresholdArguments(ProcedureArguments):
    """``weight``: lambda of the l1 norm."""

    members: str = ""
    weight: float = Field(default=0.1, ge=0.0)


def shrink(values: Tensor, threshold: float) -> Tensor:
    """Return ``sign(v) max(|v| - threshold, 0)``, the proximal map of ``threshold |v|_1``."""
    return values.sign() * (values.abs() - threshold).clamp(min=0)


@procedures.register("soft_threshold")
class SoftThreshold(Procedure[SoftThresholdArguments]):
    """SoRA: after each step the values of ``L diag(v) R`` are shrunk by ``rate * weight``.

    The map is the exact proximal one; published code shrinks twice. Ding et al. 2023,
    https://arxiv.org/abs/2311.11696
    """

    name = "soft_threshold"
    Arguments = SoftThresholdArguments

    def check_tensors(self, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        check_ranks(self.name, self.arguments.members, tensors)

    def after_step(self, adapter: Adapter, step: int, total: int) -> None:
        import torch

        with torch.no_grad():
            for part in triplets(adapter, self.name, self.arguments.members):
                rate = adapter.rate(part.values)
                part.values.copy_(shrink(part.values, rate * self.arguments.weight))

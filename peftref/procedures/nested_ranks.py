"""In each step only the leading ranks train, so that any number of them can be used."""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field

from peftref.errors import CompositionError
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

__all__ = ["NestedRanks", "NestedRanksArguments", "leading_ranks"]


class NestedRanksArguments(ProcedureArguments):
    """``b`` is uniform in ``least .. most``; ``update``: all leading ranks, or the last alone."""

    members: str = ""
    most: int = Field(gt=0)
    least: int = Field(default=1, gt=0)
    update: Literal["all", "last"] = "all"


def leading_ranks(step: int, least: int, most: int) -> int:
    """Return the ranks of ``step``: the same on all processes and in a resumed run."""
    return random.Random(f"nested_ranks:{step}").randint(least, most)


@procedures.register("nested_ranks")
class NestedRanks(Procedure[NestedRanksArguments]):
    """DyLoRA: ``B[:, :b] A[:b, :]`` in a step, one draw of ``b`` for all sites.

    With ``update: last`` only row and column ``b`` move. Valipour et al. 2023,
    https://arxiv.org/abs/2210.07558
    """

    name = "nested_ranks"
    Arguments = NestedRanksArguments

    @property
    def _members(self) -> tuple[str, ...]:
        return tuple(filter(None, self.arguments.members.split(",")))

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        a = self.arguments
        if a.least > a.most:
            raise CompositionError(f"nested_ranks: least {a.least} is above most {a.most}")
        own = adapter.tensors(self._members)
        found = [tensor for name, tensor in own.items() if name.endswith("nested.leading")]
        if not found:
            raise CompositionError("nested_ranks: no member has the primitive 'leading'")
        for tensor in found:
            tensor.fill_(leading_ranks(step, a.least, a.most))

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        a = self.arguments
        if a.update == "all":
            return
        last = leading_ranks(step, a.least, a.most) - 1
        for name, tensor in adapter.trainable.items():
            planned, gradient = adapter.planned[name], tensor.grad
            local = planned.spec.name
            if not self.concerns(planned):
                continue
            if gradient is None or local not in ("down.weight", "up.weight"):
                continue
            kept = gradient[last].clone() if local == "down.weight" else gradient[:, last].clone()
            gradient.zero_()
            (gradient[last] if local == "down.weight" else gradient[:, last]).copy_(kept)

"""Hard-concrete gates: fewer of them open, and the end of drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftref.errors import CompositionError, unknown_name
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.pruning.straight_through import OPEN, expected_open, hard_concrete
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Gates", "GatesArguments"]

_SCORES = "_scores"


class GatesArguments(ProcedureArguments):
    """As the coupling ``mask``; ``members``: comma-separated."""

    members: str
    penalty: float = Field(default=0.0, ge=0.0)
    fold: str | None = None


@procedures.register("gates")
class Gates(Procedure[GatesArguments]):
    """``penalty`` times the expected number of open gates, until they are folded in.

    When the phase ``fold`` begins, ``w`` becomes ``w z`` with the gates ``z`` as they are without
    noise, and the scores are put where every gate is one. Diff pruning, Guo et al. 2021,
    https://arxiv.org/abs/2012.07463
    """

    name = "gates"
    Arguments = GatesArguments

    def __init__(self, arguments: GatesArguments) -> None:
        super().__init__(arguments)
        self._scores: list[Tensor] = []
        self._folded = False

    def check(self, members: Sequence[str], others: Sequence[Procedure[Any]]) -> None:
        known = [phase.name for other in others for phase in other.phases(10**9)]
        if self.arguments.fold is not None and self.arguments.fold not in known:
            raise CompositionError(
                "mask: fold: " + unknown_name("phase", self.arguments.fold, known)
            )

    @property
    def per_step(self) -> bool:
        return self.arguments.penalty > 0 or self.arguments.fold is not None

    def _pairs(self, adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
        tensors = adapter.tensors(tuple(self.arguments.members.split(",")))
        names = [name for name in tensors if f"{name}{_SCORES}" in tensors]
        return [(tensors[name], tensors[f"{name}{_SCORES}"]) for name in names]

    def before_phase(
        self,
        adapter: Adapter,
        phase: str,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        import torch

        if phase != self.arguments.fold:
            return
        with torch.no_grad():
            for values, scores in self._pairs(adapter):
                values.mul_(hard_concrete(scores, draw=False))
                scores.fill_(OPEN)
        self._folded = True

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        self._scores = [scores for _, scores in self._pairs(adapter)]

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        import torch

        if self._folded or self.arguments.penalty == 0.0:
            return None
        count = torch.stack([expected_open(scores) for scores in self._scores]).sum()
        return self.arguments.penalty * count

    def state_dict(self) -> dict[str, Any]:
        return {"folded": self._folded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._folded = bool(state.get("folded", False))

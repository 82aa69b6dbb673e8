"""Masks are chosen once: before training, or when a phase begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peftref.errors import CompositionError, TrainingError, unknown_name
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.pruning.groups import Granularity, Groups, best, er_densities
from peftref.pruning.scores import FROM_DATA, OF_PRODUCTS, Data, score
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PruneProcedure", "PruneProcedureArguments"]

SETUP = "setup"


class PruneProcedureArguments(ProcedureArguments):
    """As the coupling ``prune``; ``members``: comma-separated; ``mask``: ending of its masks."""

    members: str
    mask: str
    criterion: Literal[
        "magnitude", "snip", "random", "er", "grasp", "fisher", "gradient", "first_order",
        "importance",
    ]
    keep: float = Field(gt=0.0, le=1.0)
    count: int | None = Field(default=None, gt=0)
    scope: Literal["global", "local"] = "global"
    granularity: Granularity = "entry"
    pieces: int = Field(default=1, gt=0)
    when: str = SETUP
    per: Literal["example", "batch"] = "example"
    batches: int = Field(default=4, gt=0)


@procedures.register("prune")
class PruneProcedure(Procedure[PruneProcedureArguments]):
    """Keep the groups of entries with the highest score; exactly so many, ties by a fixed draw.

    SparseAdapter, He et al. 2022, https://arxiv.org/abs/2210.04284; `peftref.pruning.scores` has
    the criteria. ``er`` is random with a density per tensor proportional to (n + m) / (n m).
    ``first_order`` is ``-w g`` summed over the steps before the phase ``when``: by how much the
    loss would rise without the change w (Lawton et al. 2023, https://arxiv.org/abs/2305.16597).
    """

    name = "prune"
    Arguments = PruneProcedureArguments

    def __init__(self, arguments: PruneProcedureArguments) -> None:
        super().__init__(arguments)
        self._sums: dict[str, Tensor] = {}
        self._chosen = False

    @property
    def _from_data(self) -> bool:
        return self.arguments.criterion in FROM_DATA

    @property
    def needs_data(self) -> bool:
        return self._from_data and self.arguments.when == SETUP

    def needs_data_at(self, phase: str) -> bool:
        return self._from_data and self.arguments.when == phase

    @property
    def batches(self) -> int:
        return self.arguments.batches if self._from_data else 1

    @property
    def per_step(self) -> bool:
        return self.arguments.when != SETUP

    def check(self, members: Sequence[str], others: Sequence[Procedure[Any]]) -> None:
        a = self.arguments
        # Phases of any training that has a step for each of them.
        known = [phase.name for other in others for phase in other.phases(10**9)]
        if a.when != SETUP and a.when not in known:
            raise CompositionError("prune: when: " + unknown_name("phase", a.when, [SETUP, *known]))
        if a.criterion == "first_order" and a.when == SETUP:
            raise CompositionError(
                "prune: criterion first_order is summed up over training; give 'when' a phase"
            )
        if a.criterion == "er" and (a.granularity != "entry" or a.count is not None):
            raise CompositionError("prune: criterion er gives a density for entries: no granularity"
                                   " but entry, and no count")

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        if self.arguments.when == SETUP:
            self._choose(adapter, self._data(batches, forward))

    def before_phase(
        self,
        adapter: Adapter,
        phase: str,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        if self.arguments.when == phase:
            self._choose(adapter, self._data(batches, forward))
            self._sums, self._chosen = {}, True

    def _data(self, batches: Iterable[Mapping[str, Any]],
              forward: Callable[[Mapping[str, Any]], Tensor]) -> Data:
        by_example = self.arguments.per == "example"
        return Data(batches, forward, self.arguments.batches, by_example)

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        if self.arguments.criterion != "first_order" or self._chosen:
            return
        neutral = self._neutral(adapter)
        for name, tensor in self._masked(adapter).items():
            if tensor.grad is not None:
                fall = (neutral[name] - tensor.detach()) * tensor.grad
                self._sums[name] = self._sums[name] + fall if name in self._sums else fall

    def _masked(self, adapter: Adapter) -> dict[str, Tensor]:
        tensors = adapter.tensors(tuple(self.arguments.members.split(",")))
        return {n: t for n, t in tensors.items() if f"{n}{self.arguments.mask}" in tensors}

    @staticmethod
    def _neutral(adapter: Adapter) -> dict[str, float]:
        """The value at which an entry changes nothing: one for a scale, else zero."""
        return {n: float(planned.spec.init == "ones") for n, planned in adapter.planned.items()}

    def _choose(self, adapter: Adapter, data: Data) -> None:
        import torch

        a = self.arguments
        masked, groups = self._masked(adapter), Groups(a.granularity, a.pieces)
        for name, tensor in masked.items():
            groups.check(name, tuple(tensor.shape))
        if a.criterion == "first_order":
            zero = {name: torch.zeros_like(tensor) for name, tensor in masked.items()}
            scores = {n: groups.sums(self._sums.get(n, zero[n])) for n in masked}
        else:
            scores = score(a.criterion, masked, self._neutral(adapter), groups, data)
        self._refuse_dead(scores)
        everything = adapter.tensors()
        alive = {n: groups.sums(_others(everything, n, a.mask, t)) for n, t in masked.items()}
        for names, keep in self._budgets(masked):
            own, can = ({n: each[n] for n in names} for each in (scores, alive))
            for name, chosen in best(own, can, keep, a.count).items():
                with torch.no_grad():
                    mask = everything[f"{name}{a.mask}"]
                    mask.copy_(groups.spread(chosen, mask))

    def _budgets(self, masked: Mapping[str, Tensor]) -> list[tuple[list[str], float]]:
        """Tensors that are ranked together, and the share of them that is kept."""
        if self.arguments.criterion == "er":
            keeps = er_densities([tuple(t.shape) for t in masked.values()], self.arguments.keep)
            return [([name], keep) for name, keep in zip(masked, keeps, strict=True)]
        if self.arguments.scope == "local":
            return [([name], self.arguments.keep) for name in masked]
        return [(list(masked), self.arguments.keep)]

    def _refuse_dead(self, scores: Mapping[str, Tensor]) -> None:
        """Before training a tensor that is zero has no scores, and would be cut as a whole."""
        a = self.arguments
        if a.when != SETUP or a.scope != "global" or a.criterion not in OF_PRODUCTS:
            return
        dead = [name for name, each in scores.items() if not bool((each != 0).any())]
        if dead:
            raise TrainingError(
                f"prune: every {a.criterion} score of {dead[0]!r} is zero (its tensor or its "
                "partner is zero at first), so the whole tensor would be cut; use criterion "
                "random or er, scope local, or an initialiser without zeros"
            )

    def state_dict(self) -> dict[str, Any]:
        return {**self._sums, "chosen": self._chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        held = dict(state)
        self._chosen = bool(held.pop("chosen", False))
        self._sums = held


def _others(tensors: Mapping[str, Tensor], name: str, mask: str, like: Tensor) -> Tensor:
    """What the other masks of a tensor leave of it."""
    import torch

    left = torch.ones_like(like)
    for key, tensor in tensors.items():
        if key.startswith(f"{name}_mask") and key != f"{name}{mask}":
            left = left * tensor.to(left.dtype)
    return left.detach()

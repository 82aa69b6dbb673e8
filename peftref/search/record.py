"""What is known of a candidate that was proposed: the only thing that front and report read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from peftref.search.pareto import undominated
from peftref.search.settings import Objective

__all__ = ["Outcome", "Record", "best_of_kind", "front_of", "losses_of"]

Outcome = Literal["running", "trained", "duplicate", "infeasible", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class Record:
    """A proposed candidate and what became of it.

    Attributes:
        number: in the study.
        key: canonical hash of the candidate; names its folder.
        composition: expression; None: the task head on the frozen backbone.
        members: techniques in it.
        rate: factor on the cited learning rates.
        parameters: trainable, without the task head; exact, known before training.
        outcome: ``duplicate`` took the values of an equal earlier candidate.
        score: validation score, to be large; None unless trained.
        loss: last validation loss.
        curve: pairs of step and validation loss.
        seconds: wall time of the training.
        memory: bytes of a training step, predicted; 0: unknown.
        step_time: seconds of a usual step of its training; 0: unknown.
        latency: seconds of one row through the trained model; 0: not measured.
        micro_batch: rows at once where the batch had to be divided; 0: all of it.
        error: why it is infeasible or failed.
        started: seconds of the search's own clock, as ``finished``.
    """

    number: int
    key: str
    composition: str | None
    members: tuple[str, ...]
    rate: float
    parameters: int
    outcome: Outcome = "running"
    score: float | None = None
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    worker: int = 0
    error: str = ""
    started: float = 0.0
    finished: float = 0.0
    memory: int = 0
    step_time: float = 0.0
    latency: float = 0.0
    micro_batch: int = 0

    @property
    def kind(self) -> Literal["floor", "single", "hybrid"]:
        """Number of techniques: none, one, several."""
        if not self.members:
            return "floor"
        return "single" if len(self.members) == 1 else "hybrid"

    @property
    def label(self) -> str:
        """The expression, and the learning rate factor where it is not one."""
        text = self.composition or "task head only"
        return text if self.rate == 1.0 else f"{text} @ {self.rate:.3g} x rate"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the record whose ``asdict`` went through JSON."""
        curve = tuple((int(step), float(loss)) for step, loss in data["curve"])
        lists: dict[str, Any] = {"members": tuple(data["members"]), "curve": curve}
        return cls(**{**data, **lists})


def losses_of(record: Record, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Return what each objective says of a trained record, less is better."""
    found: dict[Objective, float] = {
        "quality": -(record.score or 0.0), "parameters": record.parameters,
        "step_time": record.step_time, "memory": record.memory, "latency": record.latency,
    }
    return tuple(found[name] for name in objectives)


def front_of(
    records: Iterable[Record], objectives: Sequence[Objective] = ("quality", "parameters")
) -> list[Record]:
    """Return the trained records that no other one dominates, cheapest first."""
    trained = [record for record in records if record.score is not None]
    kept = undominated([losses_of(record, objectives) for record in trained])
    return sorted(
        (trained[index] for index in kept), key=lambda r: (r.parameters, -(r.score or 0.0))
    )


def best_of_kind(records: Iterable[Record], kind: str | None = None) -> list[Record]:
    """Return the trained records (of that kind), best score first, then fewest parameters."""
    trained = [r for r in records if r.score is not None and r.outcome == "trained"]
    chosen = [r for r in trained if kind is None or r.kind == kind]
    return sorted(chosen, key=lambda r: (-(r.score or 0.0), r.parameters, r.number))

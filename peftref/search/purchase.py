"""What a budget buys, said before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from peftref.errors import SearchError
from peftref.search.build_space import build_space
from peftref.search.settings import SearchRun
from peftref.search.space import Candidate
from peftref.search.study import Screen, Screened, problem_of

__all__ = ["Purchase", "Shop", "purchase"]

_FINALISTS = 3
_FINALS = 0.4  # of the budget, as the driver keeps at most
_MARGIN = 1.15  # as the driver's clock


class Shop(Screen, Protocol):
    """A screen that also knows the rows and can time a candidate."""

    rows: Mapping[str, int]

    def seconds(self, expression: str) -> float:
        """Return the measured seconds of a usual training step."""
        ...


@dataclass(frozen=True, slots=True)
class Purchase:
    """What a search can do with its budget.

    Attributes:
        candidates: trainings that the budget buys, its trials at most; None: nothing limits them.
        steps: optimiser steps of each.
        step_seconds: measured for ``timed``, a candidate of middle size, running alone.
        candidate_seconds: of one training with its evaluations.
        finals_seconds: kept for confirmation and test.
        timed: that candidate.
        memory: least and most predicted bytes of a step among the feasible baselines.
        baselines: single techniques that are tried first.
        refused: infeasible ones among them, and why.
    """

    candidates: int | None
    steps: int
    step_seconds: float
    candidate_seconds: float
    finals_seconds: float
    timed: str
    memory: tuple[int, int]
    baselines: int
    refused: tuple[tuple[str, str], ...]


def purchase(run: SearchRun, screen: Shop, limit: int | None = None) -> Purchase:
    """Return what the budget of ``run`` buys.

    Args:
        run: the settings.
        screen: compiles and times candidates.
        limit: most trainable parameters.

    Raises:
        SearchError: no baseline is feasible.
    """
    space = build_space(run.search.space, screen.layers)
    points = space.baselines("conditional", run.search.baseline_sizes)
    known = {c.key: c for c in map(space.decode, points) if c.expression is not None}
    feasible: list[tuple[Screened, Candidate]] = []
    refused: list[tuple[str, str]] = []
    for candidate in known.values():
        screened = screen(candidate.expression)
        problem = problem_of(screened, limit, run.search.memory)
        if problem:
            refused.append((str(candidate.expression), problem))
        else:
            feasible.append((screened, candidate))
    if not feasible:
        name, problem = refused[0] if refused else ("the space", "it is empty")
        raise SearchError(f"No single technique is feasible. {name}: {problem}.")
    feasible.sort(key=lambda pair: pair[0].parameters)
    middle = str(feasible[len(feasible) // 2][1].expression)
    step = screen.seconds(middle)
    steps = run.total_steps(screen.rows["train"])
    seconds = steps * step + _evaluations(run, screen.rows["validation"], steps, step)
    count, finals = _affordable(run, seconds)
    held = [screened.memory for screened, _ in feasible]
    return Purchase(
        count, steps, step, seconds, finals, middle, (min(held), max(held)), len(known),
        tuple(refused),
    )


def _evaluations(run: SearchRun, rows: int, steps: int, step: float) -> float:
    """A forward pass takes about a third of a step."""
    return len(run.evaluation.steps(steps)) * rows / run.batch_size * step / 3


def _affordable(run: SearchRun, seconds: float) -> tuple[int | None, float]:
    """Return trainings that fit beside confirmation and test, and the seconds kept for these."""
    search = run.search
    if search.budget is None:
        return search.trials, 0.0
    rounds = math.ceil(_FINALISTS * search.confirm_seeds / search.workers) + 0.3
    finals = min(rounds * seconds, _FINALS * search.budget)
    fits = search.workers * int((search.budget - finals) / (seconds * _MARGIN))
    return (fits if search.trials is None else min(fits, search.trials)), finals

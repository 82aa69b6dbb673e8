"""The live state of a search, as a watcher and ``peftref status`` see it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from peftref.search.clock import Clock
from peftref.search.jobs import Job
from peftref.search.record import Record, front_of
from peftref.search.settings import SearchRun

__all__ = ["live_state"]

_RECENT = 12


def live_state(
    run: SearchRun, phase: str, clock: Clock, records: Iterable[Record], running: Iterable[Job],
    progress: Mapping[str, Mapping[str, Any]], lost: int,
) -> dict[str, Any]:
    """Return the state as plain data.

    Args:
        run: the settings.
        phase: race, confirm, test, done or interrupted.
        clock: of the search.
        records: of all candidates.
        running: jobs given to workers.
        progress: the last report of each of them.
        lost: workers that died.
    """
    known = list(records)
    closed = sorted((r for r in known if r.outcome != "running"), key=lambda r: r.finished)
    outcomes = ("trained", "duplicate", "infeasible", "failed")
    return {
        "phase": phase,
        "elapsed": clock.now,
        "budget": clock.budget,
        "trials": run.search.trials,
        **{name: sum(r.outcome == name for r in known) for name in outcomes},
        "lost": lost,
        "running": [
            {"job": job.id, "label": _label(job, run.seed), **progress.get(job.id, {})}
            for job in running
        ],
        "recent": [_row(record) for record in closed[-_RECENT:] if record.outcome != "duplicate"],
        "front": [_row(record) for record in front_of(known, run.search.objectives)],
        "pid": os.getpid(),
    }


def _row(record: Record) -> dict[str, Any]:
    return {
        "number": record.number, "label": record.label, "kind": record.kind,
        "outcome": record.outcome, "score": record.score, "loss": record.loss,
        "parameters": record.parameters, "seconds": record.seconds, "error": record.error,
    }


def _label(job: Job, seed: int) -> str:
    if job.kind == "test":
        return "best artifact on the test split"
    name = job.composition or "task head only"
    return name if job.seed == seed else f"{name}, seed {job.seed}"

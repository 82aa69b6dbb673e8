"""What a driver and its workers say to each other: plain JSON, nothing of the study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

__all__ = ["Event", "EventKind", "Job", "Json"]

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

EventKind = Literal["ready", "started", "progress", "finished", "failed", "lost", "unusable"]


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work.

    Attributes:
        id: unique in the run; also names the job when it is given out again.
        kind: ``fit`` trains a composition, ``test`` evaluates a saved artifact on held-out data.
        composition: an expression; None: nothing but the task head.
        folder: where the artifact is written (``fit``) or read (``test``).
        rate: multiplies the cited learning rate of every member.
        seed: of initialisation, order of the data and dropout.
        steps: optimiser steps; None: as the settings say.
        attempt: how often a worker was lost with this job.
        latency: whether to time one row through the trained model.
    """

    id: str
    kind: Literal["fit", "test"]
    composition: str | None
    folder: str
    rate: float = 1.0
    seed: int = 0
    steps: int | None = None
    attempt: int = 0
    latency: bool = False

    def to_json(self) -> str:
        """Return the job as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that :meth:`to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Event:
    """What an executor reports.

    ``ready`` (a worker has loaded its session), ``started``, ``progress``, ``finished`` and
    ``failed`` (the job raised; the worker goes on) concern a job; ``lost`` means that the worker
    died with it; ``unusable`` that no worker can load a session at all.
    """

    kind: EventKind
    worker: int
    job: str = ""
    data: Mapping[str, Json] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the event as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Event:
        """Return the event that :meth:`to_json` wrote."""
        return cls(**json.loads(text))

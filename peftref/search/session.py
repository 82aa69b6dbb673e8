"""A worker's session on real models. Imports torch, so it is imported in the worker only."""

from __future__ import annotations

import time
from pathlib import Path

from peftref.compiler import restore
from peftref.search.jobs import Job, Json
from peftref.search.worker import Report, TrialSession
from peftref.training.session import Progress, TrainingSession
from peftref.training.settings import RunSettings

__all__ = ["ModelSession"]

_EVERY = 0.5  # seconds between two reports of steps


class ModelSession(TrialSession):
    """Backbone, tokenizer and data of a run, kept loaded between jobs."""

    def __init__(self, settings: str) -> None:
        run = RunSettings.model_validate_json(settings)
        self._session = TrainingSession(run, on_step=self._step)
        self._report: Report | None = None
        self._reported = 0.0

    def fit(self, job: Job, report: Report) -> dict[str, Json]:
        """Train and save; see :class:`~peftref.search.worker.TrialSession`."""
        curve: list[Json] = []

        def on_evaluate(progress: Progress) -> bool:
            curve.append([progress.step, progress.loss])
            report({"step": progress.step, "total": progress.total, "loss": progress.loss})
            return False

        self._report = report
        result = self._session.fit(
            job.composition, rate=job.rate, seed=job.seed, steps=job.steps,
            output=Path(job.folder), resume=True, on_evaluate=on_evaluate,
        )
        self._report = None
        metrics: dict[str, Json] = {name: float(v) for name, v in result.metrics.items()}
        return {
            "parameters": result.trainable_parameters,
            "score": result.score,
            "loss": result.loss,
            "metrics": metrics,
            "curve": curve,
            "seconds": result.seconds,
        }

    def test(self, job: Job) -> dict[str, Json]:
        """Score the artifact of ``job.folder`` on the test split."""
        adapted = restore(self._session.model, job.folder)
        try:
            return dict(self._session.evaluate(adapted, "test"))
        finally:
            adapted.detach()

    def _step(self, step: int, total: int) -> None:
        now = time.monotonic()
        if self._report is not None and now - self._reported >= _EVERY:
            self._reported = now
            self._report({"step": step, "total": total})

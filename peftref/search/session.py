"""A worker's session on real models. Imports torch, so it is imported in the worker only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from peftref.compiler import restore
from peftref.search.jobs import Job, Json
from peftref.search.worker import Report, TrialSession
from peftref.training.session import Progress, TrainingSession
from peftref.training.settings import RunSettings

__all__ = ["ModelSession"]

_EVERY = 0.5  # seconds between two reports of steps
_RUNS = 7  # forwards of which the latency is the median


class ModelSession(TrialSession):
    """Backbone, tokenizer and data of a run, kept loaded between jobs."""

    def __init__(self, settings: str) -> None:
        run = RunSettings.model_validate_json(settings)
        self._session = TrainingSession(run, on_step=self._step)
        self._report: Report | None = None
        self._reported = 0.0
        self._times: list[float] = []

    def fit(self, job: Job, report: Report) -> dict[str, Json]:
        """Train and save; see :class:`~peftref.search.worker.TrialSession`."""
        curve: list[Json] = []

        def on_evaluate(progress: Progress) -> bool:
            curve.append([progress.step, progress.loss])
            report({"step": progress.step, "total": progress.total, "loss": progress.loss})
            return False

        self._report, self._times = report, []
        result = self._session.fit(
            job.composition, rate=job.rate, seed=job.seed, steps=job.steps,
            output=Path(job.folder), resume=True, on_evaluate=on_evaluate,
        )
        self._report, whole = None, self._session.settings.batch_size
        metrics: dict[str, Json] = {name: float(v) for name, v in result.metrics.items()}
        return {
            "parameters": result.trainable_parameters,
            "score": result.score,
            "loss": result.loss,
            "metrics": metrics,
            "curve": curve,
            "seconds": result.seconds,
            "step_time": _usual_step(self._times),
            "latency": self._latency(job.folder) if job.latency else 0.0,
            "micro_batch": 0 if result.micro_batch == whole else result.micro_batch,
        }

    def _latency(self, folder: str) -> float:
        """Seconds of one validation row through the saved artifact, as it is attached."""
        session = self._session
        batch = session.collate([session.encoded("validation").rows[0]])
        batch = {name: value.to(session.model.device) for name, value in batch.items()}
        adapted = restore(session.model, folder)
        try:
            session.model.eval()
            with torch.inference_mode():
                return median(_seconds(session.model, batch) for _ in range(_RUNS))
        finally:
            adapted.detach()

    def test(self, job: Job) -> dict[str, Json]:
        """Score the artifact of ``job.folder`` on the test split."""
        adapted = restore(self._session.model, job.folder)
        try:
            return dict(self._session.evaluate(adapted, "test"))
        finally:
            adapted.detach()

    def _step(self, step: int, total: int) -> None:
        now = time.monotonic()
        self._times.append(now)
        if self._report is not None and now - self._reported >= _EVERY:
            self._reported = now
            self._report({"step": step, "total": total})


def _usual_step(times: Sequence[float]) -> float:
    """Median over the steps; evaluations fall into few of them."""
    return median(b - a for a, b in pairwise(times)) if len(times) > 1 else 0.0


def _seconds(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    begun = time.perf_counter()
    model(**batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun

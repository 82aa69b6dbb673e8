"""A session without a model: same contract, scores from a formula, sleeps instead of training."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from peftref.errors import TrainingError
from peftref.search.jobs import Job, Json
from peftref.search.worker import Report
from peftref.spec.expression import Use, parse_expression

SIZES = {"lora": 1000, "prefix_tuning": 500, "scaled_parallel_adapter": 800, "ia3": 100}


def size_of(expression: str | None) -> int:
    """Trainable parameters by formula: what a meta-device compile would say."""
    total = 0
    for term in parse_expression(expression) if expression else ():
        assert isinstance(term, Use)
        value = next((v for v in term.values.values() if isinstance(v, int)), 1)
        total += SIZES[term.name] * value
    return total


class FakeSession:
    """Scores grow with the parameters and the number of members; ``log`` names every start."""

    def __init__(self, settings: str) -> None:
        options = json.loads(settings or "{}")
        if "unusable" in options:
            raise TrainingError(options["unusable"])
        self.delay = float(options.get("delay", 0.0))
        self.log = Path(options["log"]) if "log" in options else None
        self.poison = options.get("poison")

    def fit(self, job: Job, report: Report) -> dict[str, Json]:
        begun = time.monotonic()
        self._log("start", job)
        if self.poison is not None and self.poison in (job.composition or ""):
            raise TrainingError("the loss is not a number")
        score = score_of(job.composition, job.seed)
        curve: list[Json] = []
        for step in (5, 10):
            time.sleep(self.delay / 2)
            curve.append([step, 1.0 - score])
            report({"step": step, "total": 10, "loss": 1.0 - score})
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        (Path(job.folder) / "peftref.json").write_text(json.dumps({"score": score}))
        self._log("end", job)
        return {
            "score": score, "loss": 1.0 - score, "metrics": {"accuracy": score}, "curve": curve,
            "seconds": time.monotonic() - begun,
        }

    def test(self, job: Job) -> dict[str, Json]:
        self._log("test", job)
        return {"accuracy": json.loads((Path(job.folder) / "peftref.json").read_text())["score"]}

    def _log(self, what: str, job: Job) -> None:
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(f"{what} {job.id} {job.attempt} {job.composition}\n")


def score_of(expression: str | None, seed: int) -> float:
    """Deterministic; singles and hybrids differ by the number of members, seeds by noise."""
    members = 0 if expression is None else expression.count(" + ") + 1
    size = size_of(expression)
    noise = hashlib.sha256(f"{expression}{seed}".encode()).digest()[0] / 255
    return 0.2 + 0.3 * (members > 0) + 0.1 * members + size / 1e5 + 0.01 * noise


def make_session(settings: str) -> FakeSession:
    """The factory: a module-level function, so a spawned process finds it."""
    return FakeSession(settings)

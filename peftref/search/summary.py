"""Everything that a report says, as plain data read from a run folder."""

from __future__ import annotations

import math
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import correlation
from typing import Any

import optuna
from scipy import stats

from peftref.search.confirm import read_confirmed, verdict
from peftref.search.folder import read_settings, read_state
from peftref.search.pareto import Point, hypervolume
from peftref.search.record import Record, front_of
from peftref.search.study import open_study, read_records

__all__ = ["summarise"]

_PACKAGES = ("peftref", "torch", "transformers", "optuna", "numpy")


def summarise(path: Path) -> dict[str, Any]:
    """Return the result of the search in ``path``; JSON can hold all of it.

    Raises:
        SearchError: the folder holds no search, or its database cannot be read.
    """
    run = read_settings(path)
    state = read_state(path)
    study = open_study(f"sqlite:///{path / 'study.db'}", create=False)
    records = list(read_records(study).values())
    noted = dict(study.user_attrs)
    confirmed = read_confirmed(run, records, noted)
    front = front_of(records, run.search.objectives)
    extra = [data for name, data in noted.items() if name.startswith("confirm-")]
    return {
        "folder": str(path),
        "phase": state["phase"],
        "counts": _counts(records),
        "seconds": {
            "wall": state["elapsed"],
            "trainings": sum(r.seconds for r in records if r.outcome == "trained"),
            "failed": sum(r.finished - r.started for r in records if r.outcome == "failed"),
            "confirmation": sum(float(data.get("seconds", 0.0)) for data in extra),
            "lost_workers": state["lost"],
        },
        "objectives": list(run.search.objectives),
        "front": [record.number for record in front],
        "trials": [_row(record) for record in records],
        "confirmed": [
            {**_row(c.record), "scores": {str(s): v for s, v in c.scores.items()},
             "mean": c.mean, "interval": c.interval}
            for c in confirmed
        ],
        "verdict": verdict(confirmed),
        "best": noted.get("best"),
        "test_opened": noted.get("test_opened"),
        "test": noted.get("test"),
        "hypervolume": _hypervolumes(records),
        "importance": _importance(study, run.search.objectives),
        "rank_correlation": _rank_correlation(records),
        "environment": _environment(),
        "settings": (path / "settings.yaml").read_text(encoding="utf-8"),
    }


def _row(record: Record) -> dict[str, Any]:
    return {**asdict(record), "kind": record.kind, "label": record.label}


def _counts(records: Sequence[Record]) -> dict[str, int]:
    outcomes = ("trained", "duplicate", "infeasible", "failed", "interrupted", "running")
    counts = {name: sum(r.outcome == name for r in records) for name in outcomes}
    return {"proposed": len(records), **counts}


def _hypervolumes(records: Sequence[Record]) -> dict[str, list[float]]:
    """Return the hypervolume over time of all trainings, and of the single techniques alone.

    The plane is validation score by log10 trainable parameters. The reference point is the
    frozen-head floor's score (or the worst score) and ten times the largest candidate.
    """
    trained = sorted((r for r in records if r.outcome == "trained"), key=lambda r: r.finished)
    if not trained:
        return {"time": [], "all": [], "singles": []}
    floors = [r.score for r in trained if r.kind == "floor" and r.score is not None]
    worst = min(r.score for r in trained if r.score is not None)
    limit = _log(max(r.parameters for r in trained)) + 1.0
    reference = Point(floors[0] if floors else worst, limit)
    result: dict[str, list[float]] = {"time": [], "all": [], "singles": []}
    for count in range(1, len(trained) + 1):
        seen = [r for r in trained[:count] if r.kind != "floor"]
        points = {r.number: Point(r.score or 0.0, _log(r.parameters)) for r in seen}
        singles = [points[r.number] for r in seen if r.kind == "single"]
        result["time"].append(trained[count - 1].finished)
        result["all"].append(hypervolume(list(points.values()), reference))
        result["singles"].append(hypervolume(singles, reference))
    return result


def _log(parameters: int) -> float:
    return math.log10(max(parameters, 1))


def _importance(study: optuna.Study, objectives: Sequence[str]) -> dict[str, float]:
    """Return how much each dimension of the space moved the score (PED-ANOVA)."""
    if "quality" not in objectives:
        return {}
    place = objectives.index("quality")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(
                study, target=lambda trial: trial.values[place]
            )
    except (ValueError, RuntimeError, ZeroDivisionError):
        return {}  # too few trials, or all of one value
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _rank_correlation(records: Sequence[Record]) -> dict[str, float] | None:
    """Return Spearman's rho between the first and the last validation loss of a training."""
    curves = [r.curve for r in records if r.outcome == "trained" and len(r.curve) > 1]
    first = [curve[0][1] for curve in curves]
    last = [curve[-1][1] for curve in curves]
    if len(curves) < 3 or len(set(first)) < 2 or len(set(last)) < 2:
        return None
    rho = correlation(stats.rankdata(first).tolist(), stats.rankdata(last).tolist())
    return {"rho": rho, "trainings": len(curves), "step": curves[0][0][0], "of": curves[0][-1][0]}


def _environment() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "platform": platform.platform(),
             "cores": str(os.cpu_count())}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found

"""Scores of a task, from scikit-learn and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as scores

from peftref.errors import SpecError, unknown_name

__all__ = ["DEFAULT_METRIC", "METRICS", "main_metric", "score", "task_metrics"]

Values = NDArray[np.floating[Any] | np.integer[Any]]

DEFAULT_METRIC = {"classification": "accuracy", "regression": "spearman", "causal_lm": "loss"}
METRICS = {
    "classification": ("accuracy", "macro_f1", "mcc", "loss"),
    "regression": ("pearson", "spearman", "loss"),
    "causal_lm": ("perplexity", "loss"),
}
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def _correlation(function: Callable[..., object]) -> Callable[[Values, Values], float]:
    def measured(labels: Values, predictions: Values) -> float:
        # A constant has no correlation with anything: scipy warns and returns nan.
        if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(function(labels, predictions).statistic)  # pyright: ignore[reportAttributeAccessIssue]

    return measured


def _macro_f1(labels: Values, predictions: Values) -> float:
    # Over the classes that occur; a class never predicted counts as 0.
    return float(scores.f1_score(labels, predictions, average="macro", zero_division=0))  # pyright: ignore[reportArgumentType]


MEASURES: Mapping[str, Callable[[Values, Values], float]] = {
    "accuracy": lambda labels, predictions: float(scores.accuracy_score(labels, predictions)),
    "macro_f1": _macro_f1,
    "mcc": lambda labels, predictions: float(scores.matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def task_metrics(
    task: str, loss: float, labels: Sequence[float], outputs: NDArray[np.float32] | None
) -> dict[str, float]:
    """Return every metric of a task.

    Args:
        task: ``classification``, ``regression`` or ``causal_lm``.
        loss: mean loss, a row or (causal_lm) a scored token.
        labels: class numbers or quantities.
        outputs: class scores (N, C) or quantities (N,); None for causal_lm.
    """
    values = {"loss": loss}
    if task == "causal_lm" or outputs is None:
        return values | {"perplexity": math.exp(loss) if loss < 700 else math.inf}
    predictions = outputs.argmax(axis=-1) if task == "classification" else outputs.reshape(-1)
    for name in METRICS[task]:
        if name in MEASURES:
            values[name] = MEASURES[name](np.asarray(labels), predictions)
    return values


def main_metric(task: str, wanted: str | None) -> str:
    """Return the metric that a run is judged by.

    Raises:
        SpecError: the task has no such metric.
    """
    if wanted is None:
        return DEFAULT_METRIC[task]
    if wanted not in METRICS[task]:
        message = unknown_name(f"{task} metric", wanted, METRICS[task])
        raise SpecError(f"evaluation.metric: {message}")
    return wanted


def score(name: str, value: float) -> float:
    """Return a metric's value such that more is better."""
    return -value if name in LOWER_IS_BETTER else value

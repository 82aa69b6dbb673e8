"""Scores, from scikit-learn and scipy; those of sequences of tags and of retrieval by formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as scores

from peftref.errors import SpecError, unknown_name

if TYPE_CHECKING:
    from peftref.training.tasks.base import Task

__all__ = [
    "class_scores", "correlations", "entities", "label_set_scores", "main_metric", "perplexity",
    "retrieval_scores", "score", "tag_scores",
]

Values = NDArray[np.floating[Any] | np.integer[Any]]
Entity = tuple[str, int, int]

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def class_scores(labels: Sequence[int], said: Sequence[int]) -> dict[str, float]:
    """Return accuracy, macro F1 and Matthews' correlation of class numbers.

    Macro F1 is over the classes that occur; a class never predicted counts as 0.
    """
    return {
        "accuracy": float(scores.accuracy_score(labels, said)),
        "macro_f1": _f1(labels, said, "macro"),
        "mcc": float(scores.matthews_corrcoef(labels, said)),
    }


def label_set_scores(
    labels: Sequence[Sequence[float]], said: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """Return micro and macro F1 of yes and no, (N, C), and the share of rows all right."""
    true, given = np.asarray(labels, dtype=int), np.asarray(said, dtype=int)
    return {
        "micro_f1": _f1(true, given, "micro"),
        "macro_f1": _f1(true, given, "macro"),
        "subset_accuracy": float((true == given).all(axis=1).mean()),
    }


def _f1(labels: object, said: object, average: str) -> float:
    found = scores.f1_score(labels, said, average=average, zero_division=0)  # pyright: ignore[reportArgumentType]
    return float(found)  # pyright: ignore[reportArgumentType]


def correlations(labels: Sequence[float], said: Sequence[float]) -> dict[str, float]:
    """Return Spearman's and Pearson's correlation of quantities; 0 where one is constant."""
    true, given = np.asarray(labels, dtype=np.float64), np.asarray(said, dtype=np.float64)
    return {
        "spearman": _correlation(stats.spearmanr, true, given),
        "pearson": _correlation(stats.pearsonr, true, given),
    }


def _correlation(function: Callable[..., object], labels: Values, said: Values) -> float:
    # A constant has no correlation with anything: scipy warns and returns nan.
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(said) == 0:
        return 0.0
    return float(function(labels, said).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return kind, first and last token of each entity, as CoNLL's evaluation finds them.

    Marks are B, I, E, S (or IOB without E and S). An entity begins at B or S, behind E or S, and
    where an I or E does not go on with the kind before it. A tag without a mark, such as a part
    of speech, is an entity of one token; O is none.
    """
    found: set[Entity] = set()
    begun, kind, ended = 0, "", True
    for index, tag in enumerate([*tags, "O"]):
        mark, dash, name = tag.partition("-")
        marked = dash == "-" and mark in "BIES"
        goes_on = marked and mark in "IE" and name == kind and not ended
        if not goes_on:
            if kind:
                found.add((kind, begun, index - 1))
            begun, kind = index, name if marked else "" if tag == "O" else tag
        ended = not marked or mark in "ES"
    return found


def tag_scores(
    labels: Sequence[Sequence[str]], said: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return F1, precision and recall of entities over all rows, and accuracy of tags.

    An entity counts if its kind and both ends are right. Nothing found is a precision of 0.
    """
    right = given = true = 0
    for row, guess in zip(labels, said, strict=True):
        wanted, got = entities(row), entities(guess)
        right, given, true = right + len(wanted & got), given + len(got), true + len(wanted)
    same = [a == b for row, guess in zip(labels, said, strict=True)
            for a, b in zip(row, guess, strict=True)]
    return {
        "f1": 2 * right / max(given + true, 1),
        "precision": right / max(given, 1),
        "recall": right / max(true, 1),
        "accuracy": sum(same) / max(len(same), 1),
    }


def retrieval_scores(ranks: Sequence[int]) -> dict[str, float]:
    """Return recall at 1 and mean reciprocal rank; the best place is 1."""
    places = np.asarray(ranks, dtype=np.float64)
    return {"recall_at_1": float((places == 1).mean()), "mrr": float((1 / places).mean())}


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def main_metric(task: Task, wanted: str | None) -> str:
    """Return the metric that a run is judged by.

    Raises:
        SpecError: the task has no such metric.
    """
    if wanted is None:
        return task.metrics[0]
    if wanted not in (*task.metrics, *task.written):
        message = unknown_name(f"{task.name} metric", wanted, (*task.metrics, *task.written))
        raise SpecError(f"evaluation.metric: {message}")
    return wanted


def score(name: str, value: float) -> float:
    """Return a metric's value such that more is better."""
    return -value if name in LOWER_IS_BETTER else value

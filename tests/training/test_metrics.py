"""Metrics against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peftref.errors import SpecError
from peftref.training.metrics import (
    class_scores,
    correlations,
    main_metric,
    perplexity,
    score,
)
from peftref.training.tasks.base import task_of


def test_classification_metrics_follow_their_formulas() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 200)
    outputs = draw.normal(size=(200, 4))
    outputs[np.arange(200), labels] += 1.0
    said = outputs.argmax(-1)
    found = class_scores(labels.tolist(), said.tolist())
    table = np.zeros((4, 4))
    np.add.at(table, (labels, said), 1)
    hits, true, given = np.diag(table), table.sum(1), table.sum(0)
    assert found["accuracy"] == pytest.approx(hits.sum() / 200, rel=1e-12)
    assert found["macro_f1"] == pytest.approx((2 * hits / (true + given)).mean(), rel=1e-12)
    # Gorodkin 2004: the correlation of the confusion table.
    above = hits.sum() * 200 - true @ given
    below = math.sqrt(200**2 - given @ given) * math.sqrt(200**2 - true @ true)
    assert found["mcc"] == pytest.approx(above / below, rel=1e-12)


def test_regression_metrics_follow_their_formulas() -> None:
    draw = np.random.default_rng(1)
    labels = draw.normal(size=50)
    x, y = labels, labels + draw.normal(size=50)
    found = correlations(x.tolist(), y.tolist())
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-6)
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-9)
    constant = correlations(labels.tolist(), [0.0] * 50)
    assert constant == {"pearson": 0.0, "spearman": 0.0}


def test_the_main_metric_is_of_the_task_and_more_is_better() -> None:
    assert main_metric(task_of("classification"), None) == "accuracy"
    assert main_metric(task_of("regression"), None) == "spearman"
    assert score("perplexity", 3.0) == -3.0
    assert score("mcc", 0.3) == 0.3
    assert perplexity(2.0) == pytest.approx(math.exp(2.0))
    with pytest.raises(SpecError, match="Unknown regression metric 'accuracy'"):
        main_metric(task_of("regression"), "accuracy")

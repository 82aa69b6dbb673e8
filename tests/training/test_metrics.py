"""Metrics against their formulas."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftref.errors import SpecError
from peftref.training.metrics import (
    class_scores,
    correlations,
    entities,
    label_set_scores,
    main_metric,
    perplexity,
    score,
    tag_scores,
)
from peftref.training.tasks.base import task_of
from peftref.training.writing import written_scores


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


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "E-x", "S-x", "B-y", "I-y"]), max_size=9))
def test_entities_are_those_that_their_marks_spell(tags: list[str]) -> None:
    """A regular expression over the marks of each kind, as CoNLL's evaluation reads them."""
    spelt = "".join(tag.replace("-", "") if tag != "O" else "--" for tag in tags)
    expected: set[tuple[str, int, int]] = set()
    for kind in "xy":
        shape = "S_|B_(I_)*(E_)?|(I_)+(E_)?|E_".replace("_", kind)
        for match in re.finditer(shape, spelt):
            expected.add((kind, match.start() // 2, match.end() // 2 - 1))
    assert entities(tags) == expected


def test_entities_count_if_kind_and_both_ends_are_right() -> None:
    true = [["B-x", "I-x", "O", "B-y"], ["NOUN", "O"]]
    said = [["B-x", "O", "O", "B-y"], ["NOUN", "VERB"]]
    # Found: y and NOUN of x, y, NOUN, VERB that were said and x, y, NOUN that are true.
    assert tag_scores(true, said) == {
        "precision": 2 / 4, "recall": 2 / 3, "f1": 2 * 2 / (4 + 3), "accuracy": 4 / 6
    }


def test_sets_of_labels_follow_their_formulas() -> None:
    true = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    said = [[True, False, False], [False, False, False], [False, True, True]]
    found = label_set_scores(true, said)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["subset_accuracy"] == pytest.approx(1 / 3)


def test_written_texts_are_measured_against_the_best_of_their_references() -> None:
    same = written_scores(["the cat sat on the mat"], [["no", "the cat sat on the mat"]])
    assert same == pytest.approx({"bleu": 1.0, "chrf": 1.0, "rouge_l": 1.0, "exact_match": 1.0})
    found = written_scores(["the cat sat here now", "a b c d"], [["the cat sat there now"],
                                                               ["x", "a b d"]])
    # Longest common subsequences: 4 of 5 and 5 words; 3 of 4 and 3.
    assert found["rouge_l"] == pytest.approx((4 / 5 + 2 * 3 / (4 + 3)) / 2)
    assert found["exact_match"] == 0.0

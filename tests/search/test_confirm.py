"""Who is confirmed, and what may then be claimed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peftref.search.confirm import Confirmed, finalists, mean_interval, verdict
from peftref.search.record import Record


def record(number: int, members: int, score: float) -> Record:
    names = tuple("abcd"[:members])
    return Record(number, f"k{number}", " + ".join(names) or None, names, 1.0, number,
                  outcome="trained", score=score)


def test_the_interval_is_students() -> None:
    values = [0.81, 0.84, 0.8, 0.86]
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert mean == pytest.approx(np.mean(values))
    assert half == pytest.approx((high - low) / 2)
    assert mean_interval([0.5]) == (0.5, None)


def test_finalists_are_the_best_two_and_the_best_of_the_other_kind() -> None:
    floor = record(0, 0, 0.99)
    singles = [record(n, 1, 0.5 + n / 100) for n in (1, 2, 3)]
    hybrids = [record(n, 2, 0.6 + n / 100) for n in (4, 5, 6)]
    assert [r.number for r in finalists([floor, *singles, *hybrids])] == [6, 5, 3]
    better = [record(n, 1, 0.8 + n / 100) for n in (7, 8, 9)]
    assert [r.number for r in finalists([floor, *better, *hybrids])] == [9, 8, 6]
    assert finalists([floor]) == []


@pytest.mark.parametrize(
    ("hybrid", "start"),
    [
        # Paired over seeds: 0.10, 0.11, 0.10 better; -0.10 worse; and 0.1, -0.1, 0.0.
        ((0.90, 0.81, 0.95), "A combination beats the best single technique"),
        ((0.70, 0.60, 0.75), "No combination beats the best single technique (difference -0.1"),
        ((0.90, 0.60, 0.85), "No combination is shown to beat the best single technique"),
    ],
)
def test_the_verdict_follows_the_paired_interval(
    hybrid: tuple[float, float, float], start: str
) -> None:
    single = dict(zip((1, 2, 3), (0.80, 0.70, 0.85), strict=True))
    pair = [Confirmed(record(1, 1, 0.8), single),
            Confirmed(record(2, 2, 0.9), dict(zip((1, 2, 3), hybrid, strict=True)))]
    assert verdict(pair).startswith(start)

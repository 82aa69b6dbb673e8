"""Front and hypervolume against definitions that try everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftref.search.pareto import Point, dominates, front, hypervolume

# A small grid makes ties and duplicates common.
GRID = st.integers(0, 6)
POINTS = st.lists(st.builds(Point, GRID, GRID), max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[Point]) -> None:
    brute = {p for p in points if not any(dominates(q, p) for q in points)}
    indices = front(points)
    assert {points[i] for i in indices} == brute
    assert len(indices) == len(brute), "each trade-off once"
    assert [points[i].cost for i in indices] == sorted(points[i].cost for i in indices)


@given(POINTS)
def test_the_hypervolume_is_the_number_of_dominated_cells(points: list[Point]) -> None:
    reference = Point(1, 5)
    cells = sum(
        any(p.score >= s + 1 and p.cost <= c for p in points)
        for s in range(1, 7) for c in range(5)
    )
    assert hypervolume(points, reference) == pytest.approx(cells)

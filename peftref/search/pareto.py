"""Non-dominated points and their hypervolume: score up, cost down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Point", "dominates", "front", "hypervolume", "undominated"]


@dataclass(frozen=True, slots=True)
class Point:
    """A score to be large and a cost to be small."""

    score: float
    cost: float


def dominates(a: Point, b: Point) -> bool:
    """Return whether ``a`` is nowhere worse than ``b`` and somewhere better."""
    no_worse = a.score >= b.score and a.cost <= b.cost
    return no_worse and (a.score > b.score or a.cost < b.cost)


def front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the non-dominated points, cheapest first.

    Of points with equal score and cost the first is kept, so the front names each trade-off once.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i].cost, -points[i].score, i))
    kept: list[int] = []
    best = float("-inf")
    for index in order:
        if points[index].score > best:
            kept.append(index)
            best = points[index].score
    return kept


def undominated(losses: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the indices of the vectors, less is better, that no other one dominates.

    Of equal vectors the first is kept.
    """
    kept: list[int] = []
    for index, own in enumerate(losses):
        beaten = any(
            all(a <= b for a, b in zip(other, own, strict=True)) and (other != own or rank < index)
            for rank, other in enumerate(losses) if rank != index
        )
        if not beaten:
            kept.append(index)
    return kept


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area dominated by ``points`` and not by ``reference``.

    Points that are not strictly better than the reference in both add nothing.
    """
    inside = [p for p in points if p.score > reference.score and p.cost < reference.cost]
    area, covered = 0.0, reference.score
    for index in front(inside):
        point = inside[index]
        area += (reference.cost - point.cost) * (point.score - covered)
        covered = point.score
    return area

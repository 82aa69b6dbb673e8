"""What the search may claim: finalists trained on fresh seeds, means and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from peftref.search.record import Record, best_of_kind
from peftref.search.settings import SearchRun

__all__ = [
    "Confirmed", "confirm_seeds", "confirmation", "finalists", "mean_interval", "read_confirmed",
    "verdict",
]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A finalist and its validation score on each fresh seed that was trained."""

    record: Record
    scores: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over the fresh seeds; the search's own score where none was trained."""
        return fmean(self.scores.values()) if self.scores else self.record.score or 0.0

    @property
    def interval(self) -> float | None:
        """Half width of the 95 % interval of the mean."""
        return mean_interval(list(self.scores.values()))[1]


def finalists(records: Iterable[Record]) -> list[Record]:
    """Return the best two, the best single and the best hybrid: at most three candidates.

    The best two are among the singles and hybrids, so one of the last two is among them.
    """
    ranked = [record for record in best_of_kind(records) if record.kind != "floor"]
    chosen = [*ranked[:2], *best_of_kind(ranked, "single")[:1], *best_of_kind(ranked, "hybrid")[:1]]
    return list({record.key: record for record in chosen}.values())


def confirm_seeds(run: SearchRun) -> list[int]:
    """Return the seeds of confirmation, none of which the search used."""
    return [run.seed + 1 + turn for turn in range(run.search.confirm_seeds)]


def confirmation(record: Record, seed: int) -> str:
    """Return the name of a finalist's training on a fresh seed."""
    return f"confirm-{record.key}-{seed}"


def read_confirmed(
    run: SearchRun, records: Iterable[Record], noted: Mapping[str, Any]
) -> list[Confirmed]:
    """Return the finalists with the scores that fresh seeds gave so far."""
    confirmed: list[Confirmed] = []
    for record in finalists(records):
        names = {seed: confirmation(record, seed) for seed in confirm_seeds(run)}
        found = {seed: noted[name] for seed, name in names.items() if name in noted}
        scores = {seed: float(data["score"]) for seed, data in found.items() if data["ok"]}
        confirmed.append(Confirmed(record, scores))
    return confirmed


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % interval by Student's t; None below two."""
    if len(values) < 2:
        return (values[0] if values else math.nan), None
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def verdict(confirmed: Sequence[Confirmed]) -> str:
    """Say whether a combination beats the best single technique, and how sure that is."""
    ranked = sorted(confirmed, key=lambda c: -c.mean)
    single = next((c for c in ranked if c.record.kind == "single"), None)
    hybrid = next((c for c in ranked if c.record.kind == "hybrid"), None)
    if single is None or hybrid is None:
        missing = "single technique" if single is None else "combination"
        return f"No {missing} was trained to the end, so none is compared."
    shared = sorted(set(single.scores) & set(hybrid.scores))
    pair = f"best combination {hybrid.record.label}, best single {single.record.label}"
    if len(shared) < 2:
        gap = hybrid.mean - single.mean
        start = "A combination leads" if gap > 0 else "No combination beats the best single one"
        return f"{start}: difference {gap:+.4f}, not confirmed on fresh seeds ({pair})."
    gap, half = mean_interval([hybrid.scores[s] - single.scores[s] for s in shared])
    half = half or 0.0
    numbers = f"difference {gap:+.4f}, 95 % interval {gap - half:+.4f} to {gap + half:+.4f}"
    if gap - half > 0:
        return f"A combination beats the best single technique ({numbers}; {pair})."
    if gap + half < 0:
        return f"No combination beats the best single technique ({numbers}; {pair})."
    return (
        f"No combination is shown to beat the best single technique: the interval includes 0 "
        f"({numbers}, {len(shared)} seeds; {pair})."
    )

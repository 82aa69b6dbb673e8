"""The search's own clock: wall time over all its runs, and what the budget still allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean

__all__ = ["Clock"]

_MARGIN = 1.15  # trainings differ in length; better one less than one too many


class Clock:
    """Counts from ``consumed``, the time that earlier runs of the same search took."""

    def __init__(
        self, budget: float | None, consumed: float, source: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget = budget
        self._source = source
        self._start = source() - consumed
        self._durations: list[float] = []

    @property
    def now(self) -> float:
        """Seconds since the search began."""
        return self._source() - self._start

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.budget is not None and self.now >= self.budget

    def took(self, duration: float) -> None:
        """Learn from a training."""
        self._durations.append(duration)

    @property
    def typical(self) -> float:
        """Expected seconds of the next training; 0 while nothing is known."""
        return fmean(self._durations[-8:]) * _MARGIN if self._durations else 0.0

    def allows(self, reserve: float) -> bool:
        """Return whether one more training fits and leaves ``reserve`` seconds."""
        if self.budget is None:
            return True
        return self.now + self.typical + reserve < self.budget

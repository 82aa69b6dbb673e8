"""What was tried and what must happen: one row of the table in docs/hostile_input.md each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

__all__ = ["Case", "Row", "each", "rows", "tried"]

Test = TypeVar("Test", bound=Callable[..., None])
Row = tuple[str, str, str]

_ROWS: list[Row] = []


@dataclass(frozen=True)
class Case:
    """Something wrong, by name; what the message says of it; and how it is made."""

    name: str
    says: str
    made: Any


def each(area: str, cases: Sequence[Case]) -> Callable[[Test], Test]:
    """Run a test for every case; the table says what its message must contain."""
    _ROWS.extend((area, case.name, f"refused: *{case.says}*") for case in cases)
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def tried(area: str, what: str, happens: str) -> Callable[[Test], Test]:
    """Put a test that is no refusal into the table."""

    def kept(test: Test) -> Test:
        _ROWS.append((area, what, happens))
        return test

    return kept


def rows() -> tuple[Row, ...]:
    """Return all rows of the test files that are imported."""
    return tuple(_ROWS)

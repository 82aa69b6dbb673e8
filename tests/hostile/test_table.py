"""The page says what the tests test."""

from __future__ import annotations

from tests.hostile.cases import rows
from tests.hostile.table import PAGE, text


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(), "run: make hostile-table"
    names = [row[:2] for row in set(rows())]
    assert len(set(names)) == len(names), "two rows have one name"

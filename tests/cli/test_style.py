"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from peftref.cli.style import count, memory, print_table


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.6, "1.00 k"), (1234567, "1.23 M"), (99950, "100 k"),
     (22_713_216, "22.7 M"), (-1500, "-1.50 k"), (0.5, "0.50"), (7e18, "7000 P")],
)  # fmt: skip
def test_count(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7 B"), (1023, "1023 B"), (2048, "2.00 KiB"), (3 << 30, "3.00 GiB")]
)
def test_memory(number: float, text: str) -> None:
    assert memory(number) == text


def test_a_piped_table_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "size"], [("x" * 300, 1), ("[bold]", None)], right=["size"])
    lines = capsys.readouterr().out.splitlines()
    assert "x" * 300 in lines[1]
    assert lines[2].startswith("[bold]")

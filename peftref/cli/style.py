"""How the commands print: tables, JSON, and numbers that a person reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["count", "memory", "note", "print_json", "print_table", "print_text"]

_DECIMAL = ("", " k", " M", " G", " T", " P")
_BINARY = (" B", " KiB", " MiB", " GiB", " TiB", " PiB")


def count(number: float) -> str:
    """Return a number with three digits and a decimal prefix: ``1234567`` -> ``1.23 M``."""
    return _scaled(number, 1000.0, _DECIMAL)


def memory(number: float) -> str:
    """Return bytes with three digits and a binary prefix: ``2048`` -> ``2.00 KiB``."""
    return _scaled(number, 1024.0, _BINARY)


def _scaled(number: float, base: float, units: Sequence[str]) -> str:
    value, step = float(number), 0
    # What would round to the base in this unit belongs to the next one.
    while abs(value) >= base - 0.5 and step < len(units) - 1:
        value, step = value / base, step + 1
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.0f}" if step == 0 and value.is_integer() else f"{value:.{digits}f}"
    return text + units[step]


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> None:
    """Print rows under a head line; the columns named in ``right`` are aligned right.

    In a pipe the table keeps its natural width: nothing is cut for a screen that is not there.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        wide = Console(width=100_000, highlight=False)
        console = Console(width=wide.measure(table).maximum, highlight=False)
    console.print(table)


def print_text(text: str = "") -> None:
    """Print a line to standard output as it is."""
    sys.stdout.write(f"{text}\n")


def note(text: str) -> None:
    """Print a line to standard error, for what a program reading the output must not see."""
    sys.stderr.write(f"{text}\n")


def print_json(value: object) -> None:
    """Print plain data as JSON for another program."""
    print_text(json.dumps(value, indent=2, ensure_ascii=False))

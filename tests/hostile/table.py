"""The table of docs/hostile_input.md, made from the tests: ``python -m tests.hostile.table``."""

from __future__ import annotations

from pathlib import Path

from tests.hostile import (
    test_artifacts,
    test_command,
    test_fuzz,
    test_interrupted,
    test_specs,
)
from tests.hostile.cases import rows

__all__ = ["PAGE", "TESTS", "text"]

# Importing them is what fills the table.
TESTS = (test_artifacts, test_command, test_fuzz, test_interrupted, test_specs)
PAGE = Path(__file__).parents[2] / "docs" / "hostile_input.md"
HEAD = """# Hostile and broken input

Whatever is given to peftref, it answers with one clear message and exit code 2 (130 for Ctrl-C);
nothing that was on disk is lost, no file outside the folder of an artifact is read for it, no
pickle is opened, and memory is bounded: a specification has at most 256 kB and 40 levels,
`peftref.json` 64 MB, a whole number 63 bits. Code is run from one place only, a plugin that the
user names or installs; an artifact never loads one. `PEFTREF_DEBUG=1` shows the traceback.

Each row is a test in `tests/hostile`, and the page is made from them (`make hostile-table`). Words
in italics are part of the message. `make fuzz` runs the last kind of rows for ten minutes on new
random input.

Not bounded is what a name stands for: a backbone or data set that an artifact or a run file names
is read where it says, and a regular expression after `module:` runs as written.
"""


def _cell(content: str) -> str:
    return content.replace("|", "\\|").replace("<", "&lt;").replace("**", "\\*\\*")


def text() -> str:
    """Return the page."""
    found = sorted(set(rows()), key=lambda row: (row[0] == "fuzzed", row))
    lines = [f"| {area} | {_cell(what)} | {_happens(happens)} |" for area, what, happens in found]
    return "\n".join([HEAD, "| where | what | what happens |", "|---|---|---|", *lines, ""])


def _happens(words: str) -> str:
    start, star, rest = words.partition("*")
    said = _cell(rest.removesuffix("*").strip(": "))
    return f"{start}*{said}*" if star else _cell(words)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")

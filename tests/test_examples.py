"""What the README and the documents say is run, and their tables are those of the catalogue.

A fenced ``python`` block is executed, blocks of one file after each other; lines ``#> text`` after
a call are what it prints. A ``yaml`` block is loaded. To renew the README's table of techniques,
run this file: ``python -m tests.test_examples``.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from peftref.cli.app import VERBS
from peftref.spec import load
from peftref.spec.catalogue import entries

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
START, END = "<!-- catalogue: ", "<!-- end of catalogue -->"


def _blocks(path: Path, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _catalogue() -> str:
    """Return the names of all techniques and compositions, as they stand in the README."""
    lines: list[str] = []
    for kind in ("technique", "composition"):
        found = sorted(e.name for e in entries(kind).values() if e.shipped)
        names = ", ".join(f"`{name}`" for name in found)
        lines += ["", f"**{len(found)} {kind}s**: {names}"]
    return "\n".join(lines[1:])


def _renewed(text: str) -> str:
    before, _, rest = text.partition(START)
    comment, _, rest = rest.partition("\n")
    after = rest.partition(END)[2]
    return f"{before}{START}{comment}\n{_catalogue()}\n{END}{after}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_runs_and_prints_what_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in _blocks(path, "python"):
        exec(compile(block, str(path), "exec"), names)
        expected = re.findall(r"^ *#> ?(.*)$", block, re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_techniques_in_documents_load(path: Path) -> None:
    for block in _blocks(path, "yaml"):
        load(block)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")


def test_commands_in_the_readme_exist() -> None:
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    named = set(re.findall(r"`peftref (\w+)", readme))
    assert named == set(VERBS)
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^ +make ([\w-]+)", readme, re.MULTILINE)) <= targets


def test_the_readme_has_the_catalogue_and_is_short() -> None:
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    assert readme == _renewed(readme), "run: python -m tests.test_examples"
    assert len(readme.splitlines()) <= 120


if __name__ == "__main__":
    DOCUMENTS[0].write_text(_renewed(DOCUMENTS[0].read_text(encoding="utf-8")), encoding="utf-8")

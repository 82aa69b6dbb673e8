"""Rules about the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import peftref

ROOT = Path(__file__).parents[1]
PYTHON = sorted(
    path
    for folder in ("peftref", "tests", "benchmarks", "examples", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
CATALOGUE = sorted(
    path for folder in ("specs", "compositions") for path in (ROOT / folder).rglob("*.y*ml")
)


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_imports_keep_to_the_contracts() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr


def test_files_are_short() -> None:
    assert PYTHON
    assert {str(path): n for path in PYTHON if (n := _lines(path)) > 400} == {}


def test_a_technique_is_a_page() -> None:
    assert CATALOGUE
    assert {str(path): n for path in CATALOGUE if (n := _lines(path)) > 30} == {}


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of the body without functions inside it, which are counted themselves.

    The options of a command are its arguments, not its length.
    """
    body = function.body[1:] if ast.get_docstring(function) else function.body
    inner = [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    whole = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
    return whole - sum((n.end_lineno or 0) - n.lineno + 1 for n in inner)


def test_functions_are_short() -> None:
    long: dict[str, int] = {}
    for path in (ROOT / "peftref").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > 40:
                long[f"{path.relative_to(ROOT)}:{node.name}"] = _length(node)
    assert long == {}


def test_public_names_are_sorted_and_exist() -> None:
    assert peftref.__all__ == sorted(peftref.__all__)
    for name in peftref.__all__:
        assert getattr(peftref, name) is not None


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_file_without_one_idea(name: str) -> None:
    assert [path for path in PYTHON if path.stem == name] == []

"""Broken run files, search files, data files and folders at the command: code 2 and one line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import peftref.cli.list
from peftref.cli.app import main
from peftref.training.rows import read_splits
from tests.hostile.cases import Case, each, tried

Words = Callable[[Path], list[str]]


@pytest.fixture
def message(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run a command that must be refused; give its last line."""

    def called(words: list[str]) -> str:
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (2, "")
        assert "Traceback" not in said.err
        last = said.err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return called


def run(**fields: object) -> Words:
    """Train with a run file that has these fields."""

    def words(folder: Path) -> list[str]:
        usual = {"backbone": str(folder / "none"), "data": str(folder / "rows.csv"),
                 "composition": "lora", "steps": 1, "output": str(folder / "out")}
        (folder / "run.yaml").write_text(json.dumps({**usual, **fields}))
        return ["train", str(folder / "run.yaml")]

    return words


def sought(**fields: object) -> Words:
    def words(folder: Path) -> list[str]:
        search = {"trials": 2, "space": {"techniques": ["lora"]}, **fields}
        text = {"backbone": "none", "data": "rows.csv", "search": search}
        (folder / "run.yaml").write_text(json.dumps(text))
        return ["search", str(folder / "run.yaml"), "--output", str(folder / "out")]

    return words


def assigned(text: str) -> Words:
    return lambda folder: [*run()(folder), "--set", text]


def kept(name: str, content: bytes, verb: str) -> Words:
    """A run folder of a search with a broken file."""

    def words(folder: Path) -> list[str]:
        (folder / "out").mkdir()
        (folder / "out" / name).write_bytes(content)
        return [verb, str(folder / "out")]

    return words


def plugin(content: bytes) -> Words:
    def words(folder: Path) -> list[str]:
        (folder / "mine.py").write_bytes(content)
        return ["list", "--plugin", str(folder / "mine.py")]

    return words


def data(content: bytes, name: str = "rows.csv", **fields: object) -> Words:
    """Train on these bytes; the backbone is never reached."""

    def words(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return run(data={"source": str(folder / name), **fields})(folder)

    return words


COMMANDS = {
    "run file": [
        Case("10**30 steps", "a whole number is below 2**63", run(steps=10**30)),
        Case("2**62 steps", "less than or equal to 10000000", run(steps=1 << 62)),
        Case("endless epochs", "less than or equal to 100000", run(epochs=1e300, steps=None)),
        Case("a batch of 2**62 rows", "batch_size", run(batch_size=1 << 62)),
        Case("a seed of 40 bits", "less than 4294967296", run(seed=1 << 40)),
        Case("2**40 threads", "threads", run(threads=1 << 40)),
        Case("a list for a backbone", "backbone: Input should be a valid string", run(backbone=[])),
        Case("a number for data", "data: ", run(data=3)),
        Case("an unknown field", "Unknown field 'stps'", run(stps=3)),
        Case("a device for a site row", "not a regular file", run(sites="/dev/zero")),
        Case("a file for the output", "is no artifact", run(output="/dev/null")),
        Case("an output name of 300 letters", "File name too long", run(output="x" * 300)),
        Case("another folder through arguments", "set 'output' of the run instead",
             run(arguments={"output_dir": "/etc"})),
        Case("a field 2,000 levels deep in --set", "more than 40 levels deep",
             assigned(".".join("a" * 2000) + "=1")),
        Case("3,000 brackets in --set", "nested deeper than 40", assigned("seed=" + "[" * 3000)),
        Case("a tag in --set", "tags are not accepted", assigned("seed=!!python/name:os.system x")),
    ],
    "search file": [
        Case("no trial", "search.trials", sought(trials=0)),
        Case("10**12 trials", "search.trials", sought(trials=10**12)),
        Case("a budget of 400 digits", "search.budget", sought(budget="9" * 400 + "h")),
        Case("a parameter limit of 500 digits", "a parameter limit is a count or a share",
             sought(max_parameters="9" * 500)),
        Case("a million workers", "search.workers", sought(workers=10**6)),
        Case("a number for the space", "search.space", sought(space=3)),
    ],
    "search folder": [
        Case("settings that are no text", "not UTF-8",
             kept("settings.yaml", b"\xff\xfe", "report")),
        Case("a state nested 100,000 deep", "no readable state.json",
             kept("state.json", b"[" * 100_000, "status")),
        Case("a state that is a list", "no readable state.json",
             kept("state.json", b"[]", "status")),
        Case("a state without its fields", "no readable state.json",
             kept("state.json", b'{"phase": 3}', "status")),
    ],
    "plugin file": [
        Case("bytes that are no Python", "failed: SyntaxError", plugin(b"\0\1\2")),
        Case("a plugin that ends the process", "failed: SystemExit",
             plugin(b"raise SystemExit(0)")),
    ],
    "data file": [
        Case("an empty file", "no rows", data(b"")),
        Case("a header alone", "no rows", data(b"text,label\n")),
        Case("random bytes", "not UTF-8", data(bytes(range(256)) * 8)),
        Case("three columns by no known name", "cannot tell which column",
             data(b"p,q,label\na,b,x\nc,d,y\n")),
        Case("no labels", "column 'label' is empty", data(b"text,label\na,\nb,\nc,\n")),
        Case("more fields than columns", "more fields than the 2 columns",
             data(b"text,label\na,b\na,b,c\n")),
        Case("fewer fields than columns", "column 'label' is empty",
             data(b"text,label\na,x\nb\n")),
        Case("a line of 200 kB", "field larger than field limit",
             data(b"text,label\n" + b"a" * 200_000 + b",x\n")),
        Case("an open quotation mark", "unexpected end of data", data(b'text,label\n"a,b\n')),
        Case("two columns of one name", "two columns share a name", data(b"text,text\na,b\n")),
        Case("JSON nested 100,000 deep", "not JSON that can be read",
             data(b"[" * 100_000, "rows.json")),
        Case("a number of 5,000 digits in JSON lines", "not a JSON object",
             data(b'{"text": "a", "label": ' + b"1" * 5000 + b"}\n", "rows.jsonl")),
        Case("rows that are lists", "expected an object", data(b"[1]\n[2]\n", "rows.jsonl")),
        Case("parquet that is none", "not a readable parquet", data(b"PAR1 no", "rows.parquet")),
        Case("a device", "No file or folder", run(data="/dev/zero")),
    ],
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _refused(case: Case, folder: Path, message: Callable[[list[str]], str]) -> None:
    assert case.says in message(case.made(folder))
    assert not (folder / "out" / "peftref.json").exists()


@each("run file", COMMANDS["run file"])
def test_a_run_file(case: Case, tmp_path: Path, message: Callable[[list[str]], str]) -> None:
    _refused(case, tmp_path, message)


@each("search file", COMMANDS["search file"])
def test_a_search_file(case: Case, tmp_path: Path, message: Callable[[list[str]], str]) -> None:
    _refused(case, tmp_path, message)


@each("search folder", COMMANDS["search folder"])
def test_a_search_folder(case: Case, tmp_path: Path, message: Callable[[list[str]], str]) -> None:
    _refused(case, tmp_path, message)


@each("plugin file", COMMANDS["plugin file"])
def test_a_plugin_file(case: Case, tmp_path: Path, message: Callable[[list[str]], str]) -> None:
    _refused(case, tmp_path, message)


@each("data file", COMMANDS["data file"])
def test_a_data_file(case: Case, tmp_path: Path, message: Callable[[list[str]], str]) -> None:
    _refused(case, tmp_path, message)


@tried("data file", "a line of 10 MB in JSON lines", "read")
def test_a_long_line_is_read(tmp_path: Path) -> None:
    row = {"text": "a" * 10_000_000, "label": "x"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_splits(str(tmp_path / "rows.jsonl"))["train"].rows == (row,)


MACHINE = [
    Case("a full disk", "out: No space left on device",
         OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")),
    Case("no right to write", "out: Permission denied",
         PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out")),
    Case("no memory left", "memory is full", MemoryError()),
]


@each("machine", MACHINE)
def test_what_the_machine_lacks_is_one_line(
    case: Case, message: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        raise case.made

    monkeypatch.setattr(peftref.cli.list, "command", command)
    assert case.says in message(["list"])

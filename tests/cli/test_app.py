"""The command itself: what it imports, how it ends, what it says."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import peftref.cli.list
from peftref.cli.app import VERBS, main
from peftref.errors import DataError


def _ends_with(code: int, *words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == code


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )


def test_help_is_fast_and_imports_little() -> None:
    code = (
        "import sys\n"
        "from peftref.cli.app import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'pydantic', 'optuna', 'networkx'}\n"
        "    print('loaded:', sorted(heavy & set(sys.modules)), 'code:', end.code)\n"
    )
    start = time.perf_counter()
    result = _run(code)
    # A tenth of a second on an idle machine; torch alone would take longer than this.
    assert time.perf_counter() - start < 3.0
    assert result.stdout.endswith("loaded: [] code: 0\n")
    for verb, summary in VERBS.items():
        assert f"{verb} " in result.stdout
        assert summary in result.stdout


@pytest.mark.parametrize(
    "words", [["list"], ["schema", "technique"], ["check", "lora"], ["list", "--json"]]
)
def test_light_verbs_never_import_torch(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from peftref.cli.app import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'triton', 'optuna', 'datasets'}\n"
        "    print(sorted(heavy & set(sys.modules)), end.code, file=sys.stderr)\n"
    )
    assert _run(code).stderr == "[] 0\n"


@pytest.mark.parametrize(("words", "seconds"), [(["--help"], 0.8), (["check", "lora"], 2.0)])
def test_light_verbs_take_little_processor_time(words: list[str], seconds: float) -> None:
    code = (
        "import resource, sys\n"
        "from peftref.cli.app import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)\n"
    )
    # A fourth of it on an idle machine. Waiting for others does not count, a crowded cache does.
    assert float(_run(code).stderr.splitlines()[-1]) < seconds


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    _ends_with(0, "--version")
    assert capsys.readouterr().out.startswith("peftref ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lst"], "Did you mean 'list'"),
        (["list", "--jsn"], "--jsn"),
        (["list", "--plugin"], "--plugin needs the path"),
        (["--plugin", "missing.py", "list"], "'missing.py' is not a Python file"),
    ],
)
def test_bad_words_end_with_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _ends_with(2, *words)
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_our_errors_are_one_line_and_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        raise DataError("column 'text' is missing")

    monkeypatch.setattr(peftref.cli.list, "command", command)
    _ends_with(2, "list")
    assert capsys.readouterr().err == "error: column 'text' is missing\n"
    monkeypatch.setenv("PEFTREF_DEBUG", "1")
    with pytest.raises(DataError, match="column 'text' is missing"):
        main(["list"])


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(peftref.cli.list, "command", command)
    _ends_with(130, "list")


@pytest.mark.parametrize("before", [True, False])
def test_a_plugin_is_loaded_before_and_after_the_verb(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    file = tmp_path / f"plugin_{before}.py"
    file.write_text(f"import os\nos.environ['PEFTREF_TEST_{before}'] = 'loaded'\n")

    def command() -> None:
        import os

        seen.append(os.environ.pop(f"PEFTREF_TEST_{before}"))

    monkeypatch.setattr(peftref.cli.list, "command", command)
    plugin = ["--plugin", str(file)] if before else [f"--plugin={file}"]
    _ends_with(0, *([*plugin, "list"] if before else ["list", *plugin]))
    assert seen == ["loaded"]


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    _ends_with(0, verb, "--help")
    out = capsys.readouterr().out
    assert f"Usage: peftref {verb}" in out
    assert "Args:" not in out

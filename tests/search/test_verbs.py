"""The verbs: what they print, their exit codes, and one real search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftref.cli.app import main
from peftref.errors import SpecError
from peftref.search.folder import RunFolder, identity
from peftref.search.load_run import load_run
from tests.search.runs import run_here, run_of


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_status_and_report_read_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    report = run_here(folder, run_of(trials=8))
    assert call("status", str(folder)) == 0
    shown = capsys.readouterr().out
    assert "done: 8 trained" in shown
    assert "Finished." in shown
    assert call("status", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["alive"] is False
    with RunFolder(folder, run_of(trials=8)):
        assert call("status", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["alive"] is True

    (folder / "report.html").unlink()
    assert call("report", str(folder)) == 0
    shown = capsys.readouterr().out
    assert report["verdict"] in shown
    for number in report["front"]:
        assert report["trials"][number]["label"] in shown
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("verb", ["status", "report"])
def test_a_folder_that_is_none_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert call(verb, str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_settings_come_from_file_space_flags_and_assignments(tmp_path: Path) -> None:
    embedded = load_run(None)
    assert len(embedded.search.space.techniques) >= 7
    file = tmp_path / "run.yaml"
    file.write_text("backbone: b\ndata: d\nsteps: 7\n")
    space = tmp_path / "space.yaml"
    space.write_text("techniques: [lora]\nmax_members: 1\n")
    flags = {"search.budget": "1h30m", "search.trials": None, "search.max_parameters": "2%"}
    run = load_run(file, space, flags, ["search.workers=3", "seed=5"])
    assert (run.backbone, run.steps, run.seed) == ("b", 7, 5)
    assert [choice.use for choice in run.search.space.techniques] == ["lora"]
    assert (run.search.budget, run.search.workers) == (5400.0, 3)
    assert run.search.max_parameters == "2%"
    space.write_text("techniques: [lora]\nmax_member: 1\n")
    with pytest.raises(SpecError, match=r"space\.yaml:2:1.*max_member"):
        load_run(file, space)
    with pytest.raises(SpecError, match=r"a duration is written 90s, 8m or 1h30m"):
        load_run(None, flags={"search.budget": "soon"})


def test_identity_is_of_what_decides_a_score() -> None:
    base = run_of(trials=8)
    assert identity(base) == identity(run_of(trials=9, budget="1h", workers=7))
    assert identity(base) != identity(run_of(trials=8, max_parameters=10))
    assert identity(base) != identity(base.model_copy(update={"seed": 1}))


@pytest.mark.slow
def test_a_real_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    space = tmp_path / "space.yaml"
    space.write_text("techniques: [ia3, {use: lora, vary: [rank]}]\nmax_members: 2\n")
    words = ("search", "--space", str(space), "--output", str(folder), "--trials", "4",
             "--max-params", "1%", "--set", "steps=3", "--set", "search.confirm_seeds=1",
             "--set", "search.budget=null")
    assert call(*words) == 0
    assert "Held-out test, opened once" in capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    rows = report["trials"]
    assert [(row["outcome"], row["error"]) for row in rows] == [("trained", "")] * 4
    assert [row["kind"] for row in rows] == ["floor", "single", "single", "hybrid"]
    # By hand: 6 layers; (IA)3 on key, value (384) and the FFN's inner stream (1536); LoRA of
    # rank 8 on query and value.
    singles = {row["members"][0]: row["parameters"] for row in rows if row["kind"] == "single"}
    assert singles == {"ia3": 6 * (384 + 384 + 1536), "lora": 6 * 2 * 8 * (384 + 384)}
    assert (folder / "best" / "peftref.json").is_file()
    assert 0 < report["test"]["metrics"]["accuracy"] <= 1
    settings = (folder / "settings.yaml").read_text()
    assert "minilm" in settings
    assert call(*words, "--set", "batch_size=8") == 2
    assert "other settings" in capsys.readouterr().err

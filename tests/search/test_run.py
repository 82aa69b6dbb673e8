"""A whole search with a fake session: what is trained, when it ends, what it claims."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import optuna
import pytest

from peftref.errors import SearchError
from peftref.search.folder import RunFolder
from peftref.search.pareto import Point, dominates
from peftref.search.run import search
from tests.search.fake_session import score_of, size_of
from tests.search.runs import FakeScreen, log_lines, run_here, run_of, tools_of


def trained(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["trials"] if row["outcome"] == "trained"]


def test_a_search_ends_with_front_confirmation_and_one_test(tmp_path: Path) -> None:
    log = tmp_path / "log"
    folder = tmp_path / "run"
    report = run_here(folder, run_of(trials=14), log=str(log))
    rows = trained(report)
    assert len(rows) == 14
    assert [row["kind"] for row in rows[:5]] == ["floor"] + ["single"] * 4
    assert all(row["parameters"] == size_of(row["composition"]) for row in rows)
    assert all(row["score"] == score_of(row["composition"], 0) for row in rows)

    points = {row["number"]: Point(row["score"], row["parameters"]) for row in rows}
    brute = {n for n, p in points.items() if not any(dominates(q, p) for q in points.values())}
    assert set(report["front"]) == brute
    kept = sorted((folder / "front").iterdir())
    assert len(kept) == len(brute)
    assert all((artifact / "peftref.json").is_file() for artifact in kept)

    # The fake rewards members: two hybrids lead, so the best single is the third finalist.
    finalists = report["confirmed"]
    assert sorted(row["kind"] for row in finalists) == ["hybrid", "hybrid", "single"]
    for row in finalists:
        assert row["scores"] == {str(s): score_of(row["composition"], s) for s in (1, 2, 3)}
    assert report["verdict"].startswith("A combination beats the best single technique")

    assert len(log_lines(log, "test")) == 1
    best = json.loads((folder / "best" / "peftref.json").read_text())
    assert report["test"]["metrics"] == {"accuracy": best["score"]}
    assert best["score"] == max(s for row in finalists[:1] for s in
                                [row["score"], *row["scores"].values()])

    again = run_here(folder, run_of(trials=14), log=str(log))
    assert again["test"] == report["test"]
    assert len(log_lines(log, "start")) == 14 + 9, "a finished search trains nothing more"


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_each_sampler_proposes_new_candidates(tmp_path: Path, sampler: str) -> None:
    report = run_here(tmp_path / "run", run_of(trials=13, sampler=sampler, confirm_seeds=0))
    rows = trained(report)
    assert len({row["key"] for row in rows}) == 13
    # Asked for its proposals, and not fed by random draws only.
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/run/study.db")
    proposed = [t for t in study.trials if "fixed_params" not in t.system_attrs]
    assert len(proposed) >= 2


def test_the_constraint_is_checked_before_training(tmp_path: Path) -> None:
    log = tmp_path / "log"
    report = run_here(tmp_path / "run", run_of(trials=8, max_parameters="0.6%"), log=str(log))
    refused = [row for row in report["trials"] if row["outcome"] == "infeasible"]
    assert refused
    assert all(row["parameters"] > 6000 for row in refused)
    assert all(row["parameters"] <= 6000 for row in trained(report))
    begun = {line[3] for line in log_lines(log, "start")}
    assert not begun & {row["composition"] for row in refused}


def test_an_equal_candidate_reuses_the_value(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Three candidates exist: the floor, ia3, and ia3 on the upper layers.
    space = {"techniques": ["ia3"], "learning_rate": [1.0, 1.0]}
    report = run_here(tmp_path / "run", run_of(trials=50, space=space), log=str(log))
    rows = trained(report)
    assert sorted(row["label"] for row in rows) == [
        "ia3", "ia3(layers='3:6')", "task head only"]
    repeated = [row for row in report["trials"] if row["outcome"] == "duplicate"]
    values = {row["key"]: row["score"] for row in rows}
    assert repeated
    assert all(row["score"] == values[row["key"]] for row in repeated)
    searched = [line for line in log_lines(log, "start") if line[1].startswith("trial")]
    assert len(searched) == 3
    assert report["verdict"] == "No combination was trained to the end, so none is compared."


def test_a_budget_ends_the_search_on_time_with_an_artifact(tmp_path: Path) -> None:
    run = run_of(trials=None, budget="8s", executor="processes", confirm_seeds=2)
    report = run_here(tmp_path / "run", run, delay=0.5)
    # Starting the workers counts; what still runs at the end is cut off at the next poll.
    assert report["seconds"]["wall"] < 9
    assert trained(report)
    assert (tmp_path / "run" / "best" / "peftref.json").is_file()


def test_a_failed_training_is_told_and_the_search_goes_on(tmp_path: Path) -> None:
    report = run_here(tmp_path / "run", run_of(trials=8), poison="prefix_tuning")
    failed = [row for row in report["trials"] if row["outcome"] == "failed"]
    assert failed
    assert {row["error"] for row in failed} == {"the loss is not a number"}
    assert all("prefix_tuning" not in row["members"] for row in trained(report))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the loss is not a number" in page


def test_the_report_needs_no_network(tmp_path: Path) -> None:
    run_here(tmp_path / "run", run_of(trials=8))
    page = (tmp_path / "run" / "report.html").read_text()
    outside = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=|@import|url\(http""")
    body = page.split("</script>", 1)[1]
    assert not outside.search(body)
    assert not re.search(r"https?://", re.sub(r"<pre>.*?</pre>", "", body, flags=re.DOTALL))
    assert "Plotly.newPlot" in body
    for row in json.loads((tmp_path / "run" / "report.json").read_text())["trials"]:
        assert row["label"].replace("'", "&#39;") in page


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="search space is empty"):
        run_here(tmp_path / "a", run_of(space={"techniques": []}))
    with pytest.raises(SearchError, match=r"smallest is ia3.*100 trainable parameters, limit 50"):
        run_here(tmp_path / "b", run_of(max_parameters=50))
    only_ia3 = run_of(trials=3, space={"techniques": ["ia3"]})
    with pytest.raises(SearchError, match="first: the loss is not a number"):
        run_here(tmp_path / "c", only_ia3, poison="ia3")
    with pytest.raises(SearchError, match="No worker can start: no such data"):
        run_here(tmp_path / "d", run_of(executor="processes"), unusable="no such data")

    run_here(tmp_path / "run", run_of(trials=5))
    with pytest.raises(SearchError, match="belongs to a search with other settings"):
        run_here(tmp_path / "run", run_of(trials=5, sampler="tpe"))
    (tmp_path / "run" / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(SearchError, match="cannot be opened"):
        run_here(tmp_path / "run", run_of(trials=5))

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(SearchError, match=r"not a run folder: it holds 'thesis.tex'"):
        run_here(tmp_path / "other", run_of())
    with (
        RunFolder(tmp_path / "busy", run_of()),
        pytest.raises(SearchError, match="another search is running"),
    ):
        run_here(tmp_path / "busy", run_of())


def test_the_screen_is_asked_once_a_candidate(tmp_path: Path) -> None:
    screen = FakeScreen()
    report = search(run_of(trials=10), tmp_path, tools_of(screen), lambda _: None)
    new = [row for row in report["trials"] if row["outcome"] != "duplicate"]
    assert len(screen.seen) == len(new) + 1, "one more for the check that anything is feasible"

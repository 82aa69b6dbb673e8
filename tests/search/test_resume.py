"""Killing workers and drivers: nothing but the running trials is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftref.search.folder import read_state
from peftref.search.run import search
from tests.search.runs import log_lines, run_here, run_of, tools_of

ROOT = Path(__file__).parents[2]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, "the search ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def spawn(folder: Path, options: dict[str, Any], **settings: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.search.runs", str(folder), json.dumps(options)]
    return subprocess.Popen([*command, json.dumps(settings)], cwd=ROOT)


def test_a_killed_worker_costs_one_attempt_and_no_trial(tmp_path: Path) -> None:
    log = tmp_path / "log"
    victims: list[str] = []

    def watch(state: dict[str, Any]) -> None:
        started = log_lines(log, "start")
        if victims or len(started) < 3:
            return
        # Children of this process: the workers. Kill the one with the newest job.
        children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
        names = {int(p): Path(f"/proc/{p}/cmdline").read_text() for p in
                 children.read_text().split()}
        worker = next(pid for pid, name in names.items() if "spawn_main" in name)
        victims.append(str(worker))
        os.kill(worker, signal.SIGKILL)

    tools = tools_of(log=str(log), delay=0.3)
    report = search(run_of(executor="processes", confirm_seeds=0), tmp_path / "run", tools, watch)
    assert victims
    assert report["counts"]["trained"] == 8
    assert report["counts"]["failed"] == report["counts"]["interrupted"] == 0
    assert report["seconds"]["lost_workers"] == 1
    attempts = [line for line in log_lines(log, "start") if line[2] == "1"]
    assert len(attempts) == 1, "the job ran once more, from the same trial"


def test_a_killed_driver_resumes_and_loses_only_what_ran(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    options = {"trials": 9, "executor": "processes", "sampler": "tpe"}
    process = spawn(folder, options, log=str(log), delay=0.4)
    wait_for(lambda: len(log_lines(log, "end")) >= 4, process)
    wait_for(lambda: len(log_lines(log, "start")) >= 5, process)
    process.kill()
    process.wait()
    before = {line[1] for line in log_lines(log, "end")}
    begun = {line[1] for line in log_lines(log, "start")}
    state = read_state(folder)
    assert not state["alive"]
    time.sleep(1.0)
    assert {line[1] for line in log_lines(log, "end")} == before, "workers end with their driver"

    report = run_here(folder, run_of(**options), log=str(log))
    rows = [row for row in report["trials"] if row["outcome"] == "trained"]
    assert len(rows) == 9
    lost = [row for row in report["trials"] if row["outcome"] == "interrupted"]
    assert len(lost) <= 2 + len(before) - len([r for r in rows if f"trial-{r['number']}" in before])
    assert {f"trial-{row['number']}" for row in lost} <= begun
    redone = {row["key"] for row in rows}
    assert all(row["key"] in redone for row in lost), "what was lost is trained again"
    assert len({row["key"] for row in rows}) == 9
    assert report["seconds"]["wall"] > state["elapsed"], "time of both runs counts"
    assert report["test"]["ok"]


def test_interrupt_leaves_a_resumable_folder(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    options = {"trials": 6, "executor": "processes"}
    process = spawn(folder, options, log=str(log), delay=0.4)
    wait_for(lambda: len(log_lines(log, "end")) >= 2, process)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=10)
    assert read_state(folder)["phase"] == "interrupted"
    report = run_here(folder, run_of(**options), log=str(log))
    assert report["counts"]["trained"] == 6

"""One contract, run over every executor; then what only processes can do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peftref.search.executors import Executor, ExecutorName, ProcessExecutor, open_executor
from peftref.search.jobs import Event, Job
from tests.search.fake_session import make_session, score_of


@contextmanager
def opened(name: ExecutorName, settings: str = "{}", workers: int = 2) -> Iterator[Executor]:
    executor = open_executor(name, make_session, settings, workers)
    try:
        yield executor
    finally:
        executor.close()


def poll_until(executor: Executor, enough: Callable[[list[Event]], bool]) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + 30
    while not enough(events):
        assert time.monotonic() < deadline, events
        events += executor.poll(0.1)
    return events


def ended(events: list[Event]) -> list[Event]:
    return [event for event in events if event.kind in ("finished", "failed", "lost")]


@pytest.mark.parametrize("name", ["inline", "processes"])
class TestContract:
    def test_every_job_ends_once_with_its_own_result(self, name: ExecutorName, tmp_path: Path):
        jobs = [Job(f"j{i}", "fit", "lora(rank=4)", str(tmp_path / f"{i}"), seed=i)
                for i in range(5)]
        waiting = list(jobs)
        events: list[Event] = []
        with opened(name) as executor:
            while len(ended(events)) < len(jobs):
                while waiting and executor.free:
                    executor.submit(waiting.pop())
                events += executor.poll(0.1)
            assert executor.free == executor.slots
        scores = {event.job: event.data["score"] for event in ended(events)}
        assert scores == {job.id: score_of(job.composition, job.seed) for job in jobs}
        for job in jobs:
            kinds = [event.kind for event in events if event.job == job.id]
            assert kinds == ["started", "progress", "progress", "finished"]
            assert (Path(job.folder) / "peftref.json").is_file()

    def test_an_error_of_a_job_leaves_the_worker_usable(self, name: ExecutorName, tmp_path: Path):
        with opened(name, '{"poison": "ia3"}', workers=1) as executor:
            executor.submit(Job("bad", "fit", "ia3", str(tmp_path)))
            failed = ended(poll_until(executor, lambda e: bool(ended(e))))
            executor.submit(Job("good", "fit", "lora", str(tmp_path)))
            finished = ended(poll_until(executor, lambda e: bool(ended(e))))
        assert [event.kind for event in failed + finished] == ["failed", "finished"]
        assert failed[0].data["error"] == "the loss is not a number"
        assert failed[0].data["expected"] is True

    def test_a_test_job_reads_the_artifact(self, name: ExecutorName, tmp_path: Path):
        with opened(name) as executor:
            executor.submit(Job("fit", "fit", None, str(tmp_path)))
            poll_until(executor, lambda e: bool(ended(e)))
            executor.submit(Job("test", "test", None, str(tmp_path)))
            (event,) = ended(poll_until(executor, lambda e: bool(ended(e))))
        assert event.data == {"accuracy": score_of(None, 0)}


def test_a_killed_worker_is_lost_at_once_and_replaced(tmp_path: Path) -> None:
    with opened("processes", '{"delay": 20}') as executor:
        assert isinstance(executor, ProcessExecutor)
        poll_until(executor, lambda e: sum(event.kind == "ready" for event in e) == 2)
        executor.submit(Job("victim", "fit", "lora", str(tmp_path)))
        started = poll_until(executor, lambda e: any(event.kind == "started" for event in e))
        os.kill(executor.pids[started[0].worker], signal.SIGKILL)
        killed = time.monotonic()
        (event,) = ended(poll_until(executor, lambda e: bool(ended(e))))
        assert time.monotonic() - killed < 2
        assert (event.kind, event.job) == ("lost", "victim")
        assert executor.free == 2
        poll_until(executor, lambda e: any(event.kind == "ready" for event in e))


def test_a_session_that_cannot_be_made_is_reported_with_its_message() -> None:
    with opened("processes", '{"unusable": "no such data"}', workers=1) as executor:
        events = poll_until(executor, lambda e: any(event.kind == "unusable" for event in e))
    assert any(event.data.get("error") == "no such data" for event in events)


def test_a_job_and_an_event_survive_their_json() -> None:
    job = Job("a", "fit", "lora(site='attention.*')", "x", rate=2**0.5, seed=3, attempt=1)
    event = Event("progress", 1, "a", {"loss": 0.1, "metrics": {"accuracy": 0.5}})
    assert Job.from_json(job.to_json()) == job
    assert Event.from_json(event.to_json()) == event

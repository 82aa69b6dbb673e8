"""Spawned worker processes on this machine, each with its own pipe."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess

from peftref.search.executors.base import Executor
from peftref.search.jobs import Event, Job
from peftref.search.worker import SessionFactory, serve

__all__ = ["ProcessExecutor"]

_STARTS = 3  # a worker that dies so often before it is ready will not get better


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    pipe: connection.Connection
    ready: bool = False
    job: Job | None = None


class ProcessExecutor(Executor):
    """``workers`` processes; a dead one is noticed at once and replaced.

    Processes are spawned, not forked: a fork of a process with threads (torch) may hang.
    """

    def __init__(self, factory: SessionFactory, settings: str, workers: int) -> None:
        self._factory = factory
        self._settings = settings
        self._threads = max(1, (os.cpu_count() or 1) // workers)
        self._dead_starts = 0
        self._workers = [self._start(number) for number in range(workers)]

    @property
    def slots(self) -> int:
        """Number of workers."""
        return len(self._workers)

    @property
    def free(self) -> int:
        """Workers without a job, also those that still load."""
        return sum(worker.job is None for worker in self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, for the status and for tests that kill."""
        return tuple(worker.process.pid or 0 for worker in self._workers)

    def submit(self, job: Job) -> None:
        """Send the job to a worker without one, preferring one that has loaded."""
        idle = [worker for worker in self._workers if worker.job is None]
        worker = min(idle, key=lambda candidate: not candidate.ready)
        worker.job = job
        try:
            worker.pipe.send_bytes(job.to_json().encode())
        except OSError:
            return  # it has just died; the next poll says so and returns the job as lost

    def poll(self, timeout: float) -> list[Event]:
        """Return what the workers sent; a dead worker gives ``lost`` and is replaced."""
        watched: list[connection.Connection | int] = []
        for worker in self._workers:
            watched += [worker.pipe, worker.process.sentinel]
        awake = set(connection.wait(watched, timeout))
        events: list[Event] = []
        for number, worker in enumerate(self._workers):
            alive = worker.process.sentinel not in awake
            open_ = self._receive(worker, events)
            if not alive or not open_:
                self._replace(number, events)
        return events

    def close(self) -> None:
        """Kill the workers: what they had not sent is worth nothing without a driver."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def _start(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, number, self._factory, self._settings, self._threads)
        process = context.Process(target=serve, args=arguments, name=f"worker {number}")
        process.start()
        theirs.close()  # else the end of the worker would not end the pipe
        return _Worker(process, ours)

    def _receive(self, worker: _Worker, events: list[Event]) -> bool:
        """Read all that has come; return False at the end of the pipe."""
        try:
            while worker.pipe.poll():
                event = Event.from_json(worker.pipe.recv_bytes().decode())
                if event.kind == "ready":
                    worker.ready = True
                    self._dead_starts = 0
                elif event.kind in ("finished", "failed"):
                    worker.job = None
                events.append(event)
        except (EOFError, OSError):
            return False
        return True

    def _replace(self, number: int, events: list[Event]) -> None:
        worker = self._workers[number]
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        if not worker.ready:
            self._dead_starts += 1
            if self._dead_starts >= _STARTS:
                reason = f"workers end before they are ready (exit code {code})"
                events.append(Event("unusable", number, data={"error": reason}))
            time.sleep(0.1)  # no spinning when a worker cannot start at all
        if worker.job is not None:
            data = {"error": f"the worker process ended (exit code {code})"}
            events.append(Event("lost", number, worker.job.id, data))
        self._workers[number] = self._start(number)

"""What a worker does: load a session once, then train or test what it is given.

A worker never opens the study. It talks JSON over one pipe and ends with its driver.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import connection, parent_process
from typing import Protocol

from peftref.errors import DeviceMemoryError, PeftRefError
from peftref.search.jobs import Event, Job, Json

__all__ = ["Report", "SessionFactory", "TrialSession", "model_session", "serve", "work"]

Report = Callable[[dict[str, Json]], None]


class TrialSession(Protocol):
    """Backbone, tokenizer and data, loaded once; each call starts from the pretrained weights."""

    def fit(self, job: Job, report: Report) -> dict[str, Json]:
        """Train ``job.composition``, write its artifact and return score, loss and costs."""
        ...

    def test(self, job: Job) -> dict[str, Json]:
        """Return the metrics of the artifact in ``job.folder`` on the held-out split."""
        ...


SessionFactory = Callable[[str], TrialSession]
"""Makes a session from the settings as JSON text; a module-level function, so it can be spawned."""


def model_session(settings: str) -> TrialSession:
    """Make a session on real models from run settings as JSON; imports torch."""
    from peftref.search.session import ModelSession

    return ModelSession(settings)


def work(session: TrialSession, job: Job, worker: int, emit: Callable[[Event], None]) -> None:
    """Run one job and emit what happens; an error of the job is an event, not an exception."""
    emit(Event("started", worker, job.id))

    def report(progress: dict[str, Json]) -> None:
        emit(Event("progress", worker, job.id, progress))

    try:
        data = session.fit(job, report) if job.kind == "fit" else session.test(job)
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except Exception as error:  # noqa: BLE001 - a job or a session of anyone may raise anything
        emit(Event("failed", worker, job.id, _describe(error)))
    else:
        emit(Event("finished", worker, job.id, data))


def serve(
    pipe: connection.Connection, worker: int, factory: SessionFactory, settings: str, threads: int
) -> None:
    """Main function of a worker process.

    Args:
        pipe: jobs come in, events go out, each one JSON text.
        worker: number of this worker in the events.
        factory: makes the session.
        settings: what ``factory`` is called with.
        threads: for the numeric libraries of this process.
    """
    # The driver decides what Ctrl-C means; the terminal sends it to the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threading.Thread(target=_end_with_driver, daemon=True).start()

    def emit(event: Event) -> None:
        pipe.send_bytes(event.to_json().encode())

    try:
        session = factory(settings)
    except Exception as error:  # noqa: BLE001 - a job or a session of anyone may raise anything
        emit(Event("unusable", worker, data=_describe(error)))
        return
    emit(Event("ready", worker))
    while True:
        try:
            job = Job.from_json(pipe.recv_bytes().decode())
        except EOFError:
            return
        work(session, job, worker, emit)


def _end_with_driver() -> None:
    """Leave at once when the driver is gone, even if it was killed in the middle of a step."""
    driver = parent_process()
    if driver is not None:
        connection.wait([driver.sentinel])
        os._exit(1)


def _describe(error: Exception) -> dict[str, Json]:
    expected = isinstance(error, PeftRefError)
    return {
        "error": str(error) if expected else f"{type(error).__name__}: {error}",
        "expected": expected,
        "memory": isinstance(error, DeviceMemoryError),
        "traceback": "".join(traceback.format_exception(error)),
    }

"""One job at a time in this very process: for debugging and small tests."""

from __future__ import annotations

from peftref.search.executors.base import Executor
from peftref.search.jobs import Event, Job
from peftref.search.worker import SessionFactory, work

__all__ = ["InlineExecutor"]


class InlineExecutor(Executor):
    """Runs the job inside :meth:`poll`, so a poll takes as long as the job.

    An error of the factory is raised as it is: there is no other process to survive it.
    """

    def __init__(self, factory: SessionFactory, settings: str) -> None:
        self._session = factory(settings)
        self._job: Job | None = None
        self._events = [Event("ready", 0)]

    @property
    def slots(self) -> int:
        """One."""
        return 1

    @property
    def free(self) -> int:
        """One when idle."""
        return int(self._job is None)

    def submit(self, job: Job) -> None:
        """Keep the job for the next poll."""
        self._job = job

    def poll(self, timeout: float) -> list[Event]:
        """Run the job given before, if any, and return all its events."""
        job, self._job = self._job, None
        if job is not None:
            work(self._session, job, 0, self._events.append)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Forget the job."""
        self._job = None

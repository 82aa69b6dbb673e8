"""The protocol of executors."""

from __future__ import annotations

from typing import Protocol

from peftref.search.jobs import Event, Job

__all__ = ["Executor"]


class Executor(Protocol):
    """Runs jobs on workers that keep a loaded session.

    The driver gives a job only while :attr:`free` is positive and then polls. Every job ends with
    exactly one ``finished``, ``failed`` or ``lost``; after ``lost`` the slot is free again.
    """

    @property
    def slots(self) -> int:
        """How many jobs run at once."""
        ...

    @property
    def free(self) -> int:
        """How many more jobs can be given now."""
        ...

    def submit(self, job: Job) -> None:
        """Give a job to a free worker."""
        ...

    def poll(self, timeout: float) -> list[Event]:
        """Return what happened, waiting at most about ``timeout`` seconds for something."""
        ...

    def close(self) -> None:
        """End all workers at once; running jobs are abandoned."""
        ...

"""Where jobs run, behind one protocol.

A further executor (a cluster) implements :class:`Executor` and adds one line to
:func:`open_executor`; the contract suite in ``tests/search`` runs over all of them.
"""

from __future__ import annotations

from typing import Literal

from peftref.search.executors.base import Executor
from peftref.search.executors.inline import InlineExecutor
from peftref.search.executors.processes import ProcessExecutor
from peftref.search.worker import SessionFactory

__all__ = ["Executor", "ExecutorName", "InlineExecutor", "ProcessExecutor", "open_executor"]

ExecutorName = Literal["inline", "processes"]


def open_executor(
    name: ExecutorName, factory: SessionFactory, settings: str, workers: int
) -> Executor:
    """Return the executor of that name, started."""
    if name == "inline":
        return InlineExecutor(factory, settings)
    return ProcessExecutor(factory, settings, workers)

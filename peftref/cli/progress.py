"""The live view of a search: a table on a terminal, one line a training elsewhere."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["Screen", "state_view"]

_ROWS = 12


class Screen:
    """Shows the states of a search on standard error, so that a pipe gets the result alone."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._seen: set[int] = set()
        self._phase = ""

    def __enter__(self) -> Self:
        """Start the live table on a terminal."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        if self._console.is_terminal:
            self._live.stop()

    def show(self, state: dict[str, Any]) -> None:
        """Show a state."""
        if self._console.is_terminal:
            self._live.update(state_view(state))
            return
        if state["phase"] != self._phase:
            self._phase = state["phase"]
            self._print(f"{_clock(state)} {self._phase}")
        for row in state["recent"]:
            if row["number"] not in self._seen:
                self._seen.add(row["number"])
                self._print(f"{_clock(state)} {_line(row)}")

    def _print(self, text: str) -> None:
        # Not `print`: rich would wrap a long line at 80 columns where there is no terminal.
        self._console.file.write(f"{text}\n")
        self._console.file.flush()


def state_view(state: dict[str, Any]) -> Group:
    """Return the state as what rich prints."""
    counts = ", ".join(f"{state[name]} {name}" for name in
                       ("trained", "failed", "infeasible", "duplicate") if state[name])
    limit = f" of {state['trials']}" if state["trials"] is not None else ""
    head = f"{_clock(state)} {state['phase']}: {counts or 'starting'}{limit}"
    lost = f", {state['lost']} workers lost" if state["lost"] else ""
    running = Table(box=None, pad_edge=False)
    for title in ("running", "step", "loss"):
        running.add_column(title, justify="left" if title == "running" else "right")
    for row in state["running"]:
        step = f"{row['step']}/{row['total']}" if "step" in row else "waiting"
        loss = f"{row['loss']:.4f}" if "loss" in row else ""
        running.add_row(Text(row["label"]), step, loss)
    front = Table(box=None, pad_edge=False)
    for title in ("front so far", "kind", "parameters", "score"):
        front.add_column(title, justify="left" if title in ("front so far", "kind") else "right")
    for row in state["front"][-_ROWS:]:
        front.add_row(Text(row["label"]), row["kind"], f"{row['parameters']:,}",
                      f"{row['score']:.4f}")
    return Group(Text(head + lost, style="bold"), running, front)


def _line(row: dict[str, Any]) -> str:
    if row["outcome"] == "trained":
        return (f"{row['label']}: score {row['score']:.4f}, {row['parameters']:,} parameters, "
                f"{row['seconds']:.0f} s")
    reason = f": {row['error']}" if row["error"] else ""
    return f"{row['label']}: {row['outcome']}{reason}"


def _clock(state: dict[str, Any]) -> str:
    def text(seconds: float) -> str:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    budget = f"/{text(state['budget'])}" if state["budget"] is not None else ""
    return f"[{text(state['elapsed'])}{budget}]"

"""Runs with the fake session, and the command that a test kills."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peftref.search.run import Tools, search
from peftref.search.settings import SearchRun
from peftref.search.study import Screen, Screened
from tests.search.fake_session import make_session, size_of

TECHNIQUES = [
    {"use": "lora", "vary": ["rank"]},
    {"use": "prefix_tuning", "vary": ["length"]},
    {"use": "scaled_parallel_adapter", "vary": ["bottleneck"]},
    "ia3",
]


class FakeScreen(Screen):
    """Stands for compiling on the meta device."""

    layers = 6
    parameters = 1_000_000

    def __init__(self) -> None:
        self.seen: list[str | None] = []

    def __call__(self, expression: str | None) -> Screened:
        self.seen.append(expression)
        return Screened(size_of(expression))


def run_of(**options: Any) -> SearchRun:
    """A run over four techniques; ``options`` go to the search section."""
    chosen: dict[str, Any] = {"trials": 8, "executor": "inline", "sampler": "random", **options}
    space = chosen.pop("space", {})
    chosen["space"] = {"techniques": TECHNIQUES, **space}
    return SearchRun.model_validate({"backbone": "fake", "data": "fake", "search": chosen})


def tools_of(screen: FakeScreen | None = None, **settings: Any) -> Tools:
    """The fake session with these settings."""
    kept = screen or FakeScreen()
    return Tools(lambda _: kept, make_session, lambda _: json.dumps(settings))


def run_here(path: Path, run: SearchRun, **settings: Any) -> dict[str, Any]:
    """Search in this process and return the report."""
    return search(run, path, tools_of(**settings), lambda _: None)


def log_lines(file: Path, what: str) -> list[list[str]]:
    """The lines ``what id attempt composition`` of a session's log."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.split(" ", 3) for line in lines if line.startswith(what)]


if __name__ == "__main__":
    folder, options, settings = sys.argv[1:]
    run_here(Path(folder), run_of(**json.loads(options)), **json.loads(settings))

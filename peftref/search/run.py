"""One search from its settings to its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from peftref.errors import SearchError
from peftref.search.build_space import build_space
from peftref.search.clock import Clock
from peftref.search.driver import Driver, Watcher
from peftref.search.executors import Executor, open_executor
from peftref.search.folder import RunFolder, identity
from peftref.search.report import write_report
from peftref.search.settings import SearchRun
from peftref.search.study import Rules, Screen, Study, open_study
from peftref.search.worker import SessionFactory, model_session

__all__ = ["Tools", "default_folder", "model_tools", "parameter_limit", "search"]


@dataclass(frozen=True, slots=True)
class Tools:
    """What touches models: ``screen`` opens the backbone on the meta device, ``factory`` a session.

    Both are called late: after the settings and the folder have been found sound.
    """

    screen: Callable[[SearchRun], Screen]
    factory: SessionFactory
    worker_settings: Callable[[SearchRun], str]


def model_tools() -> Tools:
    """Return the tools on real models; torch is imported when they are used."""
    return Tools(_screen, model_session, lambda run: run.training().model_dump_json())


def _screen(run: SearchRun) -> Screen:
    from peftref.search.screen import BackboneScreen

    return BackboneScreen(run)


def default_folder(run: SearchRun) -> Path:
    """Return the folder of these settings: the same command finds its own run again."""
    name = "".join(c if c.isalnum() else "-" for c in Path(run.data.source).stem)
    return Path("runs") / f"search-{name}-{identity(run)[:6]}"


def search(run: SearchRun, path: Path, tools: Tools, watch: Watcher) -> dict[str, Any]:
    """Run or resume a search and return its report as plain data.

    Raises:
        SearchError: it cannot start, resume or end with a result.
    """
    if not run.search.space.techniques:
        raise SearchError("The search space is empty: 'search.space.techniques' names none.")
    with RunFolder(path, run) as folder:
        study = open_study(folder.url, create=True, objectives=run.search.objectives)
        screen = tools.screen(run)
        space = build_space(run.search.space, screen.layers)
        rules = Rules(
            parameter_limit(run, screen), run.search.sampler, run.search.trials, run.seed,
            run.search.baseline_sizes, run.search.memory, run.search.objectives,
        )
        try:
            book = Study(study, space, rules, screen)
            book.require_feasible()
            clock = Clock(run.search.budget, _consumed(path))
            Driver(run, folder, book, lambda: _executor(run, tools), clock, watch).run()
        except optuna.exceptions.OptunaError as error:
            raise SearchError(f"The study in {path} broke: {error}. Free space on the disk and "
                              "repeat the command to resume.") from error
        return write_report(path)


def _executor(run: SearchRun, tools: Tools) -> Executor:
    settings = tools.worker_settings(run)
    return open_executor(run.search.executor, tools.factory, settings, run.search.workers)


def parameter_limit(run: SearchRun, screen: Screen) -> int | None:
    """Return the most trainable parameters as a count."""
    limit = run.search.max_parameters
    if isinstance(limit, str):
        return int(float(limit.strip().removesuffix("%")) / 100 * screen.parameters)
    return limit


def _consumed(path: Path) -> float:
    try:
        return float(json.loads((path / "state.json").read_text(encoding="utf-8"))["elapsed"])
    except (OSError, ValueError, KeyError):
        return 0.0

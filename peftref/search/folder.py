"""A run folder: its lock, settings, study, artifacts and live state.

    settings.yaml   the merged run file
    study.db        all candidates and their results
    state.json      what a search is doing, rewritten as it goes
    trials/<key>/   artifact of each trained candidate that may still matter
    front/, best/   artifacts of the result
    report.html, report.json
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from peftref.errors import SearchError, SpecError
from peftref.search.settings import SearchRun
from peftref.spec.loader import node_of, read_yaml, to_text, validated

__all__ = ["RunFolder", "identity", "read_state"]

# What may change between a run and its resumption: how far and where, not what.
_FREE = frozenset({"trials", "budget", "workers", "executor", "confirm_seeds"})

_PATIENCE = 1.0  # seconds: `status` holds the lock for a moment to see whether anyone else does


class _State(BaseModel):
    """What a watcher needs of the live state."""

    phase: str
    elapsed: float
    budget: float | None
    trials: int | None
    trained: int
    duplicate: int
    infeasible: int
    failed: int
    lost: int
    running: tuple[Mapping[str, Any], ...]
    recent: tuple[Mapping[str, Any], ...]
    front: tuple[Mapping[str, Any], ...]


def identity(run: SearchRun) -> str:
    """Return a hash of all settings that decide what a candidate scores."""
    data = run.model_dump(mode="json", exclude={"output"})
    data["search"] = {k: v for k, v in data["search"].items() if k not in _FREE}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


class RunFolder:
    """An open run folder; only one driver has it at a time."""

    def __init__(self, path: Path, run: SearchRun) -> None:
        self.path = path
        self._run = run
        self._lock = FileLock(path / "lock", timeout=_PATIENCE)

    def __enter__(self) -> RunFolder:
        """Lock the folder and write its settings.

        Raises:
            SearchError: it cannot be written, is in use, or belongs to other settings.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_strangers()
            self._lock.acquire()
        except Timeout as error:
            raise SearchError(
                f"{self.path} is locked: another search is running in it. Watch it with "
                f"'peftref status {self.path}', or choose another folder with --output."
            ) from error
        except OSError as error:
            raise SearchError(f"{self.path} cannot be used ({error.strerror}).") from error
        data = self._run.model_dump(mode="json", by_alias=True)
        _replace(self.path / "settings.yaml", to_text(data))
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; a killed process releases it as well."""
        self._lock.release()

    @property
    def url(self) -> str:
        """The study's storage."""
        return f"sqlite:///{self.path / 'study.db'}"

    @property
    def resumed(self) -> bool:
        """Whether a study exists already."""
        return (self.path / "study.db").exists()

    def trial(self, name: str) -> Path:
        """Return the folder of one training."""
        return self.path / "trials" / name

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace the live state; a reader sees the old one or the new one, never a part."""
        _replace(self.path / "state.json", json.dumps(state))

    def keep(self, source: Path, name: str) -> Path:
        """Copy an artifact to ``name`` in this folder, replacing what was there."""
        target = self.path / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return target

    def clear(self, name: str) -> None:
        """Remove a sub-folder."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def _refuse_strangers(self) -> None:
        settings = self.path / "settings.yaml"
        if not settings.exists():
            strangers = [p.name for p in self.path.iterdir() if p.name != "lock"]
            if strangers:
                raise SearchError(
                    f"{self.path} is not a run folder: it holds {min(strangers)!r} and no "
                    "settings.yaml. Choose an empty or new folder with --output."
                )
            return
        if identity(read_settings(self.path)) != identity(self._run):
            raise SearchError(
                f"{self.path} belongs to a search with other settings ({settings}). Repeat that "
                "search's settings to resume it, or choose another folder with --output."
            )


def read_settings(path: Path) -> SearchRun:
    """Return the settings that a run folder was made with.

    Raises:
        SearchError: it has none.
    """
    file = path / "settings.yaml"
    if not file.is_file():
        raise SearchError(f"{path} is not the folder of a search: it has no settings.yaml.")
    return validated(SearchRun, read_yaml(file))


def read_state(path: Path) -> dict[str, Any]:
    """Return the live state of a run folder; ``alive`` says whether its driver still runs.

    Raises:
        SearchError: there is none, or it cannot be read.
    """
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        validated(_State, node_of(state))
    except (OSError, ValueError, RecursionError, SpecError) as error:
        raise SearchError(
            f"{path} has no readable state.json: not the folder of a search, or a search that "
            "has not started yet."
        ) from error
    lock = FileLock(path / "lock", timeout=0)
    try:
        with lock:
            state["alive"] = False
    except Timeout:
        state["alive"] = True
    return state


def _replace(file: Path, text: str) -> None:
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)

"""Folders appear complete or not at all, and nothing already on disk is lost on the way."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from peftref.errors import ArtifactError

__all__ = ["check_free", "replaced_folder"]


def check_free(path: Path, *, marker: str, overwrite: bool) -> None:
    """Refuse a place that holds something else, before any work is done for it.

    Args:
        path: where a folder is to be written.
        marker: the file that makes a folder one of ours.
        overwrite: whether one of ours may be replaced.

    Raises:
        ArtifactError: something is there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or not (path / marker).is_file():
        raise ArtifactError(f"{path} exists and holds something else; name another output")
    if not overwrite:
        raise ArtifactError(f"{path} already holds a result; name another output or --overwrite")


@contextmanager
def replaced_folder(path: Path) -> Generator[Path]:
    """Give an empty folder beside ``path`` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield made
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    umask = os.umask(0)
    os.umask(umask)
    made.chmod(0o777 & ~umask)  # mkdtemp lets only its owner in
    old = made.with_name(f"{made.name}.old")
    if path.exists():
        path.rename(old)
    made.rename(path)
    shutil.rmtree(old, ignore_errors=True)

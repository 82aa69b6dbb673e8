"""Nothing that is already on disk is lost."""

from __future__ import annotations

from pathlib import Path

from peftref.errors import ArtifactError

__all__ = ["check_free", "check_no_checkpoints", "checkpoints_of"]

MARKER = "peftref.json"


def checkpoints_of(output: Path) -> Path:
    """Return the folder of a run's checkpoints: beside its output, and gone when it ends well."""
    return output.with_name(f"{output.name}.checkpoints")


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds something else, before any work is done for it.

    Args:
        path: where an artifact is to be written.
        overwrite: whether an artifact may be replaced.

    Raises:
        ArtifactError: something is there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or not (path / MARKER).is_file():
        raise ArtifactError(f"{path} exists and is no artifact; name another output")
    if not overwrite:
        raise ArtifactError(
            f"{path} already holds an artifact; name another output, or replace it with --overwrite"
        )


def check_no_checkpoints(output: Path, *, overwrite: bool) -> None:
    """Refuse to start anew where an interrupted run could be resumed.

    Raises:
        ArtifactError: there are checkpoints.
    """
    folder = checkpoints_of(output)
    if not overwrite and any(folder.glob("checkpoint-*")):
        raise ArtifactError(
            f"{folder} holds checkpoints of an interrupted run; go on with --resume, or start anew "
            "with --overwrite"
        )

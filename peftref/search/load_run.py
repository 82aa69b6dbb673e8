"""From files and flags to the settings of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peftref.search.settings import SearchRun, SpaceSettings
from peftref.spec.loader import plain, read_yaml, validated
from peftref.training.settings import load_model

__all__ = ["EMBEDDED", "load_run"]

EMBEDDED = Path(__file__).with_name("embedded.yaml")


def load_run(
    file: Path | None,
    space: Path | None = None,
    flags: Mapping[str, object] | None = None,
    assignments: Sequence[str] = (),
) -> SearchRun:
    """Return the settings of a search.

    Args:
        file: run file; None: the embedded example. Without a ``search`` section it is searched
            as the embedded example is.
        space: file with the fields of ``search.space``, in place of what the run file says.
        flags: dotted field names and values; None values count as not given.
        assignments: what stood after ``--set``.

    Raises:
        SpecError: a field is unknown or its value is wrong, with its place in the file.
    """
    below: dict[str, object] = {}
    if file is not None and "search" not in read_yaml(file).value:
        below["search"] = plain(read_yaml(EMBEDDED).value["search"])
    if space is not None:
        document = read_yaml(space)
        validated(SpaceSettings, document)  # an error names a place in this file
        below["search.space"] = plain(document)
    merged = {**below, **(flags or {})}
    return load_model(SearchRun, file or EMBEDDED, merged, assignments)

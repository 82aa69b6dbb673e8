"""Every error that peftref raises on purpose.

    PeftRefError
    ├── SpecError           a specification, expression or run file is wrong
    ├── CompositionError    specs are well formed but mean nothing together
    ├── BackboneError       the model is not what the composition needs
    │   └── SitesError      no row describes the model; carries a draft of one
    ├── MergeError          something cannot be folded into the backbone
    ├── DataError           data set, column or label problem
    ├── TrainingError       training went wrong (not a number, lost procedure)
    │   └── DeviceMemoryError  not even the smallest batch fits into memory
    ├── ArtifactError       a saved folder is missing, damaged or foreign
    └── SearchError         a study cannot start, resume or go on

Each message says where, which rule, what was found and what would be valid. The command line
prints it alone, without a traceback, and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "ArtifactError",
    "BackboneError",
    "CompositionError",
    "DataError",
    "DeviceMemoryError",
    "Mark",
    "MergeError",
    "PeftRefError",
    "SearchError",
    "SitesError",
    "SpecError",
    "TrainingError",
    "unknown_name",
]


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a source text; prints as ``path:line:column`` (both from 1)."""

    source: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


class PeftRefError(Exception):
    """Base of all errors raised on purpose; ``mark`` is where in the user's text."""

    def __init__(self, message: str, *, mark: Mark | None = None) -> None:
        self.mark = mark
        super().__init__(f"{mark}: {message}" if mark is not None else message)


class SpecError(PeftRefError):
    """A specification, expression or run file is wrong."""


class CompositionError(PeftRefError):
    """Well-formed specs that have no sound meaning together."""


class BackboneError(PeftRefError):
    """The model is not what the composition needs."""


class SitesError(BackboneError):
    """No row describes the model and none could be inferred with certainty.

    Attributes:
        model_type: of the model's configuration.
        draft: YAML of a row with what was found, to be corrected.
    """

    def __init__(self, message: str, *, model_type: str, draft: str) -> None:
        super().__init__(message)
        self.model_type, self.draft = model_type, draft


class MergeError(PeftRefError):
    """Something cannot be folded into the backbone's weights."""


class DataError(PeftRefError):
    """A data set, column or label problem."""


class TrainingError(PeftRefError):
    """Training went wrong or would lose something."""


class DeviceMemoryError(TrainingError):
    """The device's memory does not hold a step, however the batch is divided."""


class ArtifactError(PeftRefError):
    """A saved folder is missing, damaged or made for something else."""


class SearchError(PeftRefError):
    """A study cannot start, resume or go on."""


_MANY = 40


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not known: the nearest valid one, then all.

    Of a long list only what is near is named, and where the rest can be read.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(names) > _MANY:
        others = f" Near it: {', '.join(near[1:])}." if near[1:] else ""
        return f"Unknown {kind} {name!r}.{hint}{others} peftref list --kind all prints all names"
    return f"Unknown {kind} {name!r}.{hint} Available: {', '.join(names) or 'none'}"

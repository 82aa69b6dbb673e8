"""Where named specifications are found.

Shipped files lie in ``peftref/catalogue`` of an installed package, or in ``specs`` and
``compositions`` of a source checkout. A user's folders work the same: those in the environment
variable ``PEFTREF_CATALOGUE`` (separated as in ``PATH``) and ``peftref/catalogue`` in the user's
configuration folder (``XDG_CONFIG_HOME``, by default ``~/.config``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from peftref.errors import SpecError, unknown_name
from peftref.spec.loader import LARGEST_DOCUMENT, read_yaml
from peftref.spec.template import Kind, Template

__all__ = ["Entry", "entries", "find", "macro", "read_template"]

_HEAD = re.compile(r"""^(technique|composition|macro)\s*:\s*["']?(\w+)""", re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Entry:
    """A specification by name.

    Attributes:
        name: what expressions call it.
        kind: ``technique``, ``composition`` or ``macro``.
        path: its file.
        shipped: whether it comes with the package.
    """

    name: str
    kind: Kind
    path: Path
    shipped: bool

    @property
    def template(self) -> Template:
        """The file's content; read when asked for, so that a broken file hurts only its users."""
        return read_template(self.path)


def read_template(path: Path) -> Template:
    """Return the template in the file at ``path``, cached until the file changes."""
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"{path}: cannot be read ({reason})") from error
    return _read(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)
def _read(path: Path, modified: int, size: int) -> Template:  # noqa: ARG001 - the cache's key
    return Template.read(read_yaml(path))


def entries(kind: Kind | None = None) -> dict[str, Entry]:
    """Return all entries of a kind (None: techniques, compositions and macros) by name.

    Raises:
        SpecError: two files define one name, or a folder of ``PEFTREF_CATALOGUE`` is missing.
    """
    found: dict[str, Entry] = {}
    for entry in _scan():
        other = found.get(entry.name)
        if other is not None:
            raise SpecError(f"{entry.path}: {entry.kind} {entry.name!r} is already defined in "
                            f"{other.path}; give it another name")
        found[entry.name] = entry
    chosen = (e for e in found.values() if kind is None or e.kind == kind)
    return {entry.name: entry for entry in sorted(chosen, key=lambda entry: entry.name)}


def find(name: str) -> Entry:
    """Return the technique or composition called ``name``.

    Raises:
        SpecError: there is none; names the nearest.
    """
    known = {key: e for key, e in entries().items() if e.kind != "macro"}
    if name not in known:
        raise SpecError(unknown_name("technique or composition", name, known))
    return known[name]


def macro(name: str) -> Template | None:
    """Return the macro called ``name``, None where there is none."""
    entry = entries("macro").get(name)
    return None if entry is None else entry.template


def _scan() -> Iterator[Entry]:
    for folder, shipped in _folders():
        for path in sorted(folder.rglob("*.yaml")) + sorted(folder.rglob("*.yml")):
            # A folder or device by such a name is no file of ours.
            head = _HEAD.search(_text(path)) if path.is_file() else None
            if head is not None:
                yield Entry(head[2], head[1], path, shipped)  # pyright: ignore[reportArgumentType]


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(LARGEST_DOCUMENT)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from error


def _folders() -> Iterator[tuple[Path, bool]]:
    """Yield every folder once, shipped ones first."""
    packaged = _PACKAGE / "catalogue"
    root = packaged if packaged.is_dir() else _PACKAGE.parent
    seen: set[Path] = set()
    for folder in (root / "specs", root / "compositions"):
        seen.add(folder)
        yield folder, True
    for text in os.environ.get("PEFTREF_CATALOGUE", "").split(os.pathsep):
        folder = Path(text).expanduser().resolve()
        if not text or folder in seen:
            continue
        if not folder.is_dir():
            raise SpecError(f"PEFTREF_CATALOGUE names {text!r}, which is not a folder")
        seen.add(folder)
        yield folder, False
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    own = (Path(base).expanduser() / "peftref" / "catalogue").resolve()
    if own.is_dir() and own not in seen:
        yield own, False

"""What ``peftref.json`` says, checked before anything acts on it."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, StrictStr

from peftref.errors import ArtifactError, SpecError
from peftref.spec.loader import node_of, validated

__all__ = ["FORMAT", "INFO", "checked_file", "read_info"]

FORMAT = 1
INFO = "peftref.json"
LARGEST_INFO = 1 << 26


class _Entry(BaseModel):
    """An object of the file; what a later version adds to it is no error."""

    model_config = ConfigDict(frozen=True, extra="allow")


class _Backbone(_Entry):
    name: StrictStr | None = None
    model_type: StrictStr | None = None
    dtype: StrictStr | None = None
    hash: StrictStr | None = None


class _Plugin(_Entry):
    name: StrictStr
    version: StrictStr
    provides: tuple[StrictStr, ...] = ()


class _Info(_Entry):
    composition: Mapping[str, JsonValue] | None
    tensors: Mapping[str, tuple[StrictInt, ...]]
    backbone: _Backbone = _Backbone()
    seed: StrictInt = Field(default=0, ge=0)
    plugins: tuple[_Plugin, ...] = ()
    sites: Mapping[str, JsonValue] | None = None
    metadata: Mapping[str, JsonValue] = Field(default_factory=dict)


def checked_file(folder: Path, name: str) -> Path:
    """Return a file of an artifact that may be read.

    A link may lead to another file of the folder, or to the blobs of a hub's cache, where the
    folder itself is made of links.

    Raises:
        ArtifactError: it is absent, no regular file, or a link to somewhere else.
    """
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: has no {name}") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path}: cannot be read ({reason})") from None
    cached = home.parent.name == "snapshots" and real.is_relative_to(home.parents[1] / "blobs")
    if not real.is_relative_to(home) and not cached:
        raise ArtifactError(f"{path}: is a link that leads out of the folder; put the file there")
    if not regular:
        raise ArtifactError(f"{path}: is not a regular file")
    return path


def read_info(folder: Path) -> dict[str, Any]:
    """Return the content of ``peftref.json``, every field that peftref acts on of its type.

    Raises:
        ArtifactError: the folder or the file is missing, or the file is damaged.
    """
    try:
        found = folder.is_dir()
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read ({error.strerror})") from None
    if not found:
        raise ArtifactError(f"{folder}: no such folder; an artifact is a folder with {INFO}")
    if not (folder / INFO).exists() and not (folder / INFO).is_symlink():
        raise ArtifactError(f"{folder}: has no {INFO}, so it is no peftref artifact")
    file = checked_file(folder, INFO)
    info = _parsed(file)
    if not isinstance(info, dict):
        raise ArtifactError(f"{file}: must hold a JSON object")
    known = info.get("format")
    if type(known) is not int or known != FORMAT:
        raise ArtifactError(
            f"{file}: format {known!r:.40} is not known to this version of peftref, which reads "
            f"format {FORMAT}"
        )
    for name in ("composition", "tensors"):
        if name not in info:
            raise ArtifactError(f"{file}: the entry {name!r} is missing")
    try:
        validated(_Info, node_of(info))
    except SpecError as error:
        raise ArtifactError(f"{file}: {error}") from None
    return info


def _parsed(file: Path) -> Any:  # noqa: ANN401 - any JSON value
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_INFO + 1)
        if len(content) > LARGEST_INFO:
            raise ArtifactError(f"{file}: larger than {LARGEST_INFO} bytes; no artifact needs that")
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise ArtifactError(f"{file}: is nested too deep") from None
    except ValueError as error:  # what JSON and UTF-8 refuse, numbers of too many digits
        raise ArtifactError(f"{file}: is not whole JSON ({error})") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")

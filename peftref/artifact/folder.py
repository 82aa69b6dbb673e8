"""A saved adapter: one folder of JSON and safetensors. No pickle is ever read or written.

    peftref.json                what it is: composition, backbone, seed, versions, metadata
    adapter_model.safetensors   adapter tensors; those of a task head under ``head/``
    peft/                       the same in huggingface/peft's format, where that can express it
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from peftref.artifact.info import FORMAT, INFO, checked_file, read_info
from peftref.errors import ArtifactError, SpecError
from peftref.spec.canonical import canonical_composition
from peftref.spec.composition import CompositionSpec
from peftref.spec.loader import node_of, validated

__all__ = ["FORMAT", "HEAD", "INFO", "TENSORS", "Artifact", "read", "replaced_folder"]

TENSORS = "adapter_model.safetensors"
HEAD = "head/"


@dataclass(frozen=True)
class Artifact:
    """What a folder holds.

    Attributes:
        path: the folder.
        composition: the locked composition; None: a task head on the plain backbone.
        tensors: adapter tensors by name.
        head: task-head tensors by parameter name.
        info: everything in ``peftref.json``.
    """

    path: Path
    composition: CompositionSpec | None
    tensors: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    info: Mapping[str, Any]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the caller of ``save`` added: labels, pooling, metrics, ..."""
        return self.info.get("metadata", {})


def read(path: str | Path) -> Artifact:
    """Read a folder; nothing in it is executed.

    Raises:
        ArtifactError: it is missing, truncated, of an unknown format or inconsistent.
    """
    folder = Path(path)
    info = read_info(folder)
    composition = None if info["composition"] is None else _locked(folder, info["composition"])
    declared: dict[str, list[int]] = info["tensors"]
    stored = _read_tensors(folder)
    found = {name: list(tensor.shape) for name, tensor in stored.items()}
    if found != declared:
        odd = sorted(set(found) ^ set(declared))
        what = f"tensor {odd[0]!r}" if odd else "the shape of a tensor"
        raise ArtifactError(f"{folder}: {what} differs between {INFO} and {TENSORS}")
    head = {n.removeprefix(HEAD): t for n, t in stored.items() if n.startswith(HEAD)}
    tensors = {n: t for n, t in stored.items() if not n.startswith(HEAD)}
    return Artifact(folder, composition, tensors, head, info)


def _locked(folder: Path, stated: Mapping[str, Any]) -> CompositionSpec:
    """Return the composition, which is written out: it names no file and no technique."""
    try:
        return validated(CompositionSpec, canonical_composition(node_of(stated)))
    except SpecError as error:
        raise ArtifactError(f"{folder / INFO}: the composition is wrong: {error}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = checked_file(folder, TENSORS)
    try:
        stored = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read, it may be truncated ({error})") from None
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ArtifactError(
                f"{file}: tensor {name!r} holds values that are no finite numbers; its training "
                "diverged, or the file is damaged"
            )
    return stored


def write_files(folder: Path, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the two files of an artifact into an existing folder."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    shapes = {name: list(tensor.shape) for name, tensor in plain.items()}
    text = json.dumps({**info, "format": FORMAT, "tensors": shapes}, indent=1, ensure_ascii=False)
    safetensors.torch.save_file(plain, folder / TENSORS, metadata={"format": "pt"})
    (folder / INFO).write_text(text + "\n", encoding="utf-8")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give an empty sibling folder; at the end it takes the place of ``path`` in one move.

    When anything fails, what was at ``path`` is as it was.

    Raises:
        ArtifactError: ``path`` is a file, a folder of something else, or cannot be written.
    """
    if path.is_symlink():
        path = path.resolve()  # the link stays, and what it leads to is replaced
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path}: is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / INFO).exists():
        raise ArtifactError(f"{path}: holds other files and no {INFO}; give a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield fresh
        fresh.chmod(0o755)
        old = fresh.with_name(fresh.name + ".old")
        if path.exists():
            path.rename(old)
        try:
            fresh.rename(path)
        except OSError:
            if old.exists() and not path.exists():  # else another writer was faster
                old.rename(path)
            raise
        finally:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)

"""Tensors of an artifact for a member of another composition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from peftref.artifact.folder import Artifact, read
from peftref.errors import ArtifactError
from peftref.ir.plan import Plan, PlannedTensor

__all__ = ["tensors_for"]


def tensors_for(plan: Plan, member: str, path: str | Path) -> Mapping[str, Tensor]:
    """Return what an artifact holds for a member, by the names that ``plan`` gives its tensors.

    The artifact has a member of the same name, or only one.

    Raises:
        ArtifactError: it holds another technique, other sizes, or leaves a tensor open.
    """
    artifact = read(path)
    theirs = _member(artifact, member)
    found: dict[str, Tensor] = {}
    for tensor in (t for t in plan.tensors if t.member == member):
        name, spec = _renamed(tensor, theirs), tensor.spec
        if not (spec.trainable or spec.buffer):
            if spec.seed is None:
                raise ArtifactError(
                    f"{path}: no artifact holds {tensor.name!r}, which is drawn anew under each "
                    "name; give its technique a seed of its own"
                )
            continue
        value = artifact.tensors.get(name)
        if value is None or tuple(value.shape) != spec.shape:
            has = "no such tensor" if value is None else f"shape {tuple(value.shape)}"
            raise ArtifactError(
                f"{path}: member {member!r} needs {name!r} of shape {spec.shape}; found {has}. "
                "Give the member the technique, sizes and backbone that the artifact has"
            )
        found[tensor.name] = value
    return found


def _member(artifact: Artifact, member: str) -> str:
    """The member of the artifact that is meant."""
    members = artifact.composition.members if artifact.composition is not None else ()
    names = [each.name for each in members]
    if member in names:
        return member
    if len(names) == 1:
        return names[0]
    raise ArtifactError(
        f"{artifact.path}: holds members {', '.join(names) or 'none'}; one of them must be named "
        f"{member!r}"
    )


def _renamed(tensor: PlannedTensor, theirs: str) -> str:
    start = f"{tensor.owner}." if tensor.owner else ""
    own = tensor.name.removeprefix(start)
    return start + theirs + own.removeprefix(tensor.member)

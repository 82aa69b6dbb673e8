"""From an artifact back to a model that predicts, in one call."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peftref.adapted import Adapted
from peftref.artifact.folder import INFO, Artifact, read
from peftref.backbone.hf import head_modules, weight_hash
from peftref.compiler import restore
from peftref.errors import ArtifactError, BackboneError
from peftref.training.backbone import TaskHead, load_backbone
from peftref.training.floor import HeadOnly

__all__ = ["Opened", "attached_artifact", "from_pretrained", "open_artifact"]


@dataclass(frozen=True, slots=True)
class Opened:
    """An artifact on its backbone.

    Attributes:
        model: ready to predict.
        tokenizer: with a padding token.
        adapted: what is attached, or the bare head.
        head: task, class names, pooling.
        artifact: what the folder holds.
    """

    model: PreTrainedModel
    tokenizer: Any
    adapted: Adapted | HeadOnly
    head: TaskHead
    artifact: Artifact


def from_pretrained(
    path: str | Path, *, backbone: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Rebuild backbone, head, pooling, adapter and tokenizer from an artifact.

    Args:
        path: folder that a training wrote.
        backbone: where the backbone is now; None: where it was in training.
        device: where the model goes; None: the first accelerator, else the processor.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ArtifactError: the folder is missing, damaged, or does not say what it was trained for.
        BackboneError: the backbone cannot be loaded.
    """
    opened = open_artifact(path, backbone=backbone, device=device)
    return opened.model, opened.tokenizer


def open_artifact(
    path: str | Path, *, backbone: str | None = None, device: str | None = None
) -> Opened:
    """Do as `from_pretrained`, and return the handle and the metadata too."""
    artifact = read(path)
    head = _task_head(artifact)
    stated: Mapping[str, Any] = artifact.info.get("backbone", {})
    name = backbone or artifact.metadata.get("backbone") or stated.get("name")
    if not isinstance(name, str):
        raise ArtifactError(f"{path}: does not say which backbone it belongs to; name it")
    dtype = stated.get("dtype") or "float32"
    try:
        loaded = load_backbone(name, head, dtype=dtype, device=device)
    except BackboneError as error:
        hint = "" if backbone else "; if it is elsewhere now, name it with backbone"
        raise BackboneError(f"{path} needs its backbone: {error}{hint}") from error
    adapted = _on(loaded.model, artifact)
    loaded.model.eval()
    return Opened(loaded.model, loaded.tokenizer, adapted, loaded.head, artifact)


@contextmanager
def attached_artifact(model: PreTrainedModel, path: str | Path) -> Generator[Adapted | HeadOnly]:
    """Put an artifact on a loaded backbone for the time of a block.

    The task head keeps the artifact's values afterwards.
    """
    adapted = _on(model, read(path))
    try:
        yield adapted
    finally:
        adapted.detach()


def _on(model: PreTrainedModel, artifact: Artifact) -> Adapted | HeadOnly:
    if artifact.composition is not None:
        return restore(model, artifact.path)
    known, found = artifact.info.get("backbone", {}).get("hash"), weight_hash(model)
    if known is not None and known != found:
        raise ArtifactError(
            f"{artifact.path}: was trained on a backbone with weights {known[:19]}, this model "
            f"has {found[:19]}; load that backbone"
        )
    adapted = HeadOnly(model, head_modules(model))
    adapted.load_head(artifact.head)
    return adapted


def _task_head(artifact: Artifact) -> TaskHead:
    """Return the head that the artifact was trained with.

    An artifact that ``adapted.save(path)`` wrote without a word about its task is understood by
    the class of its model and the shape of its head.
    """
    metadata = artifact.metadata
    names = tuple(metadata.get("label_names", ()))
    pooling = metadata.get("pooling", "model")
    task = metadata.get("task")
    if task is not None:
        return TaskHead(task, names, pooling)
    kind = str(artifact.info.get("backbone", {}).get("class", ""))
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return TaskHead("causal_lm")
    if kind.endswith("ForConditionalGeneration"):
        return TaskHead("seq2seq")
    last = [value for value in artifact.head.values() if value.dim() == 2][-1:]
    if kind.endswith("ForSequenceClassification") and last:
        count = last[0].shape[0]
        names = names or tuple(f"LABEL_{number}" for number in range(count))
        return TaskHead("regression" if count == 1 else "classification", names, pooling)
    raise ArtifactError(
        f"{artifact.path / INFO}: does not say which task {kind or 'the model'} was trained for. "
        "Load the backbone yourself and call peftref.restore(model, path)"
    )

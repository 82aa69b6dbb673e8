"""Load a backbone with the head of a task, and start that head afresh for every run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from peftref.backbone import hf
from peftref.backbone.names import resolve_backbone
from peftref.errors import BackboneError
from peftref.training.encode import pad_token
from peftref.training.pictures import load_processor
from peftref.training.settings import Pooling
from peftref.training.tasks.base import task_of

__all__ = ["Backbone", "HeadState", "TaskHead", "load_backbone", "load_tokenizer"]


@dataclass(frozen=True, slots=True)
class TaskHead:
    """What a model must end in: a task, its classes, and what their scores are read from."""

    task: str
    label_names: tuple[str, ...] = ()
    pooling: Pooling = "auto"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded model.

    Attributes:
        model: with the task's head.
        tokenizer: with a padding token; for a task on pictures the image processor.
        head: as asked, its pooling resolved.
        fresh: names of the parameters that the checkpoint lacked.
        notes: what a user should know, as sentences.
    """

    model: PreTrainedModel
    tokenizer: Any
    head: TaskHead
    fresh: frozenset[str]
    notes: tuple[str, ...]


def load_backbone(name: str, head: TaskHead, *, dtype: str, device: str | None) -> Backbone:
    """Load a checkpoint with a head for the task.

    Args:
        name: folder or hub name of the checkpoint.
        head: what the model must end in.
        dtype: float32, bfloat16 or float16.
        device: where the model goes; None: the first accelerator, else the processor.

    Raises:
        BackboneError: there is no such checkpoint, or it cannot carry such a head.
    """
    target = _device(device)
    source = resolve_backbone(name)
    task = task_of(head.task)
    model = hf.load_backbone(
        source, task.head, task.outputs(head.label_names), getattr(torch, dtype)
    )
    tokenizer = load_processor(source) if task.sees_pictures else (
        load_tokenizer(source, words=task.words)
    )
    if not task.sees_pictures:
        _tell_tokens(model, tokenizer)
    held = _checkpoint_names(source)
    trained = any(key.endswith("pooler.dense.weight") for key in held)
    pooling, notes = task.shape(model, head.pooling, source, trained_pooler=trained)
    if head.label_names:
        names = dict(enumerate(head.label_names))
        model.config.id2label = names
        model.config.label2id = {label: index for index, label in names.items()}
    cast("Any", model).to(target).eval()
    heads = hf.head_modules(model)
    fresh = frozenset(
        key for key, value in model.named_parameters()
        if key.split(".")[0] in heads and held.get(key) != tuple(value.shape)
    )
    resolved = TaskHead(head.task, head.label_names, pooling)
    return Backbone(model, tokenizer, resolved, fresh, notes)


def _tell_tokens(model: PreTrainedModel, tokenizer: Any) -> None:  # noqa: ANN401
    """Let the model know the special tokens: edits may act at them."""
    model.config.pad_token_id = pad_token(tokenizer)
    for token in ("cls_token_id", "sep_token_id"):
        if getattr(model.config, token, None) is None:
            setattr(model.config, token, getattr(tokenizer, token, None))


def load_tokenizer(source: str, *, words: bool = False) -> Any:  # noqa: ANN401 - tokenizers share no type
    """Return the tokenizer of a checkpoint, with a padding token.

    Args:
        source: the checkpoint.
        words: whether it will be given words, to which some put a space in front only if told.

    Raises:
        BackboneError: there is none.
    """
    gguf = sorted(Path(source).glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": gguf[0].name} if gguf else {}
    if words:
        options["add_prefix_space"] = True
    try:
        with hf.quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise BackboneError(
            f"backbone {source!r} has no tokenizer that transformers can load: {_first(error)}"
        ) from error
    pad_token(tokenizer)
    before = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if words and isinstance(before, ByteLevel):
        before.add_prefix_space = True  # classes of no family of their own do not pass it on
    return tokenizer


def _checkpoint_names(source: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of a safetensors checkpoint."""
    if Path(source).is_dir():
        files = sorted(Path(source).glob("*.safetensors"))
    else:
        with hf.quiet():
            files = _cached_files(source)
    names: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            names |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return names


def _cached_files(source: str) -> list[Path]:
    index = cached_file(source, "model.safetensors.index.json",
                        _raise_exceptions_for_missing_entries=False)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
    return [Path(str(cached_file(source, name))) for name in names]


def _device(wanted: str | None) -> torch.device:
    if wanted is not None:
        try:
            device = torch.device(wanted)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise BackboneError(f"device {wanted!r} cannot be used: {_first(error)}") from error
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class HeadState:
    """The task head as it was loaded; puts it back, with new random numbers where it is new.

    Args:
        model: as loaded, nothing attached.
        names: the head's parameters.
        fresh: those of them that the checkpoint lacked.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], fresh: frozenset[str]) -> None:
        held = dict(model.named_parameters())
        self._values: Mapping[str, Tensor] = {
            name: held[name].detach().clone() for name in names
        }
        self._fresh = sorted({name.rpartition(".")[0] for name in names if name in fresh})

    def reset(self, model: PreTrainedModel, seed: int) -> None:
        """Start the head as for a new run: equal seed, equal head."""
        held = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self._values.items():
                held[name].copy_(value)
        # On the processor, so that a head does not depend on the device; no other stream moves.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for path in self._fresh:
                module = model.get_submodule(path)
                device = next(module.parameters()).device
                model._init_weights(module.cpu())  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                module.to(device)

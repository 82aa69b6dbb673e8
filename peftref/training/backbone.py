"""Load a backbone with the head of a task, and start that head afresh for every run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from peftref.backbone import hf
from peftref.backbone.names import resolve_backbone
from peftref.errors import BackboneError
from peftref.training.encode import pad_token
from peftref.training.pooling import choose_pooling, set_pooling
from peftref.training.settings import Pooling

__all__ = ["Backbone", "HeadState", "TaskHead", "load_backbone", "load_tokenizer"]


@dataclass(frozen=True, slots=True)
class TaskHead:
    """What a model must end in: a task, its classes, and what their scores are read from."""

    task: Literal["classification", "regression", "causal_lm"]
    label_names: tuple[str, ...] = ()
    pooling: Pooling = "auto"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded model.

    Attributes:
        model: with the task's head.
        tokenizer: with a padding token.
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
    labels = len(head.label_names) if head.task == "classification" else None
    model = hf.load_backbone(source, head.task, labels, getattr(torch, dtype))
    tokenizer = load_tokenizer(source)
    model.config.pad_token_id = pad_token(tokenizer)
    for token in ("cls_token_id", "sep_token_id"):  # edits may act at these tokens
        if getattr(model.config, token, None) is None:
            setattr(model.config, token, getattr(tokenizer, token, None))
    held = _checkpoint_names(source)
    notes: list[str] = []
    pooling: Pooling = "model"
    if head.task != "causal_lm":
        trained = any(key.endswith("pooler.dense.weight") for key in held)
        pooling, reason = choose_pooling(model, head.pooling, source, trained_pooler=trained)
        set_pooling(model, pooling)
        notes.append(reason)
    if head.task == "classification":
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
    return Backbone(model, tokenizer, resolved, fresh, tuple(notes))


def load_tokenizer(source: str) -> Any:  # noqa: ANN401 - tokenizers share no type
    """Return the tokenizer of a checkpoint, with a padding token.

    Raises:
        BackboneError: there is none.
    """
    gguf = sorted(Path(source).glob("*.gguf"))
    options = {"gguf_file": gguf[0].name} if gguf else {}
    try:
        with hf.quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise BackboneError(
            f"backbone {source!r} has no tokenizer that transformers can load: {_first(error)}"
        ) from error
    pad_token(tokenizer)
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

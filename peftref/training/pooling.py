"""What a classification head of an encoder reads: the mean of the tokens, or the first one."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from peftref.errors import BackboneError
from peftref.training.settings import Pooling

__all__ = ["choose_pooling", "embedding_pooling", "masked_mean", "set_pooling"]

Resolved = Literal["mean", "cls", "model"]
_CLASSES: dict[tuple[type, str], type] = {}


def masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the tokens that the mask keeps: ``sum(m * h) / sum(m)``.

    Args:
        hidden: (B, T, d).
        mask: (B, T), 1 for a token and 0 for padding; None keeps all.

    Returns:
        (B, d).

    Raises:
        BackboneError: the mask does not belong to these tokens.
    """
    if mask is None:
        return hidden.mean(dim=1)
    if mask.shape != hidden.shape[:2]:
        raise BackboneError(
            f"mean pooling needs a mask of shape {tuple(hidden.shape[:2])} for the hidden states "
            f"that the backbone returns, not {tuple(mask.shape)}"
        )
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)


def choose_pooling(
    model: PreTrainedModel, wanted: Pooling, checkpoint: str, *, trained_pooler: bool
) -> tuple[Resolved, str]:
    """Return the pooling and the reason for it, as a sentence.

    Args:
        model: a sequence-classification model.
        wanted: what the run file says.
        checkpoint: where the weights came from.
        trained_pooler: the checkpoint has the weights of a pooler.

    Raises:
        BackboneError: the head reads something else than a first token, so it cannot be told.
    """
    if not _reads_first_token(model):
        if wanted in ("mean", "cls"):
            raise BackboneError(
                f"pooling {wanted!r} is for encoders whose head reads one vector; "
                f"{type(model).__name__} pools by itself: use pooling auto or model"
            )
        return "model", f"pooling: that of {type(model).__name__}"
    if wanted != "auto":
        return wanted, f"pooling: {wanted}, as given"
    stated = _sentence_transformers(checkpoint)
    if stated is not None:
        return stated, f"pooling: {stated}, as the checkpoint's sentence-transformers files say"
    if hasattr(model.config, "classifier_pooling"):
        return "model", f"pooling: {model.config.classifier_pooling}, of the model's own head"
    if trained_pooler and getattr(model.base_model, "pooler", None) is not None:
        return "model", "pooling: the checkpoint's own trained pooler"
    return "mean", "pooling: mean, because the checkpoint has no trained pooler"


def embedding_pooling(
    model: PreTrainedModel, wanted: Pooling, checkpoint: str
) -> tuple[Literal["mean", "cls"], str]:
    """Return what a vector of a text is made of, and the reason for it, as a sentence.

    Args:
        model: a base model without a head.
        wanted: what the run file says.
        checkpoint: where the weights came from.

    Raises:
        BackboneError: the model reads and writes, or a pooling of its own is asked for.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(
            f"{type(model).__name__} reads with an encoder and writes with a decoder; a vector of "
            "a text takes an encoder or a decoder alone"
        )
    if wanted == "model":
        raise BackboneError("pooling 'model' is of heads; a vector of a text takes mean or cls")
    if wanted != "auto":
        return wanted, f"pooling: {wanted}, as given"
    stated = _sentence_transformers(checkpoint)
    if stated is not None:
        return stated, f"pooling: {stated}, as the checkpoint's sentence-transformers files say"
    return "mean", "pooling: mean"


def _reads_first_token(model: PreTrainedModel) -> bool:
    # Decoders score every token with `score` and take the last; BART has `classification_head`,
    # XLNet and XLM a `sequence_summary`; T5's classifier is `classification_head` too.
    own = getattr(model, "classifier", None)
    return isinstance(own, nn.Module) and not getattr(model.config, "is_encoder_decoder", False)


def _sentence_transformers(checkpoint: str) -> Literal["mean", "cls"] | None:
    found = _file(checkpoint, "1_Pooling/config.json")
    if found is None or _file(checkpoint, "modules.json") is None:
        return None
    content = json.loads(found.read_text(encoding="utf-8"))
    if content.get("pooling_mode_mean_tokens"):
        return "mean"
    return "cls" if content.get("pooling_mode_cls_token") else None


def _file(checkpoint: str, name: str) -> Path | None:
    if Path(checkpoint).is_dir():
        path = Path(checkpoint) / name
        return path if path.is_file() else None
    cached = cached_file(
        checkpoint, name, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )
    return Path(cached) if cached else None


def set_pooling(model: PreTrainedModel, pooling: Resolved) -> None:
    """Make the head read the pooled vector, by a changed class of the base model alone.

    The base model then returns the pooled vector as its pooler output and as its only hidden
    state, so that any head that reads either of them, which is every encoder head of
    transformers, reads the pooled vector. The checkpoint's own pooler is dropped: it would be
    neither read nor trained.
    """
    if pooling == "model":
        return
    base = model.base_model
    if hasattr(model.config, "classifier_pooling") and base is not model:
        model.config.classifier_pooling = pooling
        return
    if getattr(base, "pooler", None) is not None:
        base.pooler = cast("Any", None)
    base.__class__ = _pooled_class(type(base), pooling)


def _pooled_class(base: type[nn.Module], pooling: Literal["mean", "cls"]) -> type[nn.Module]:
    held = _CLASSES.get((base, pooling))
    if held is not None:
        return held
    position = list(inspect.signature(base.forward).parameters).index("attention_mask") - 1

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the base's signature
        output = base.forward(self, *args, **kwargs)
        hidden: Tensor = output.last_hidden_state
        mask = args[position] if len(args) > position else kwargs.get("attention_mask")
        pooled = masked_mean(hidden, mask) if pooling == "mean" else hidden[:, 0]
        # A new output, because heads read it by position, which is the order of the fields.
        changed = {"last_hidden_state": pooled.unsqueeze(1)}
        if hasattr(output, "pooler_output"):
            changed["pooler_output"] = pooled
        return dataclasses.replace(output, **changed)

    forward.__signature__ = inspect.signature(base.forward)  # pyright: ignore[reportFunctionMemberAccess]
    # transformers keys what it can record of a model by the printed class, so that stays.
    content = {
        "forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": lambda self, _: (_rebuilt, (base, pooling), self.__dict__),
    }
    made = type(base.__name__, (base,), content)
    _CLASSES[base, pooling] = made
    return made


def _rebuilt(base: type[nn.Module], pooling: Literal["mean", "cls"]) -> nn.Module:
    """Return an empty instance, for deepcopy and the serialisers of torch."""
    made = _pooled_class(base, pooling)
    return made.__new__(made)

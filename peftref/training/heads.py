"""Losses that transformers' models do not have, by a changed class of the loaded model.

The loss belongs to the model, so that every trainer, procedure and loop gets it from
``model(**batch).loss``, as of any other model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

__all__ = ["EmbeddingOutput", "averages_loss", "choose_one", "embed"]

SCALE = 20.0  # of cosines, before they are compared
_CLASSES: dict[tuple[type, str], type] = {}
_OWN = ("members", "labels")


def averages_loss(model: nn.Module) -> bool:
    """Whether the model takes the mean over a batch, whatever number of terms it is told."""
    return type(model).__name__ in {
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    }


@dataclass
class EmbeddingOutput(ModelOutput):
    """Vectors of sequences, (N, d), and the loss of a labelled batch."""

    loss: Tensor | None = None
    embeddings: Tensor | None = None


def choose_one(model: PreTrainedModel) -> None:
    """Let a model with one score a sequence choose among the sequences of a row.

    ``p(choice) = softmax of the scores of a row``; the loss is the cross-entropy. A call with
    ``members`` (N, 2), row and place of each sequence, returns logits (B, C); a place that a row
    lacks has the least number. Without it, the model is as before.
    """
    _change(model, "choose", _choices)


def embed(model: PreTrainedModel) -> None:
    """Let a model that returns one pooled vector compare the two sequences of a row.

    With quantities as labels, the loss is ``(cos(a, b) - label)^2``. With whole numbers it is the
    cross-entropy of ``20 cos(a_i, b_j)`` over the second sequences ``j`` of the batch, of which
    the label is the right one (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748;
    Henderson et al. 2017, https://arxiv.org/abs/1705.00652).
    """
    _change(model, "embed", _vectors)


def _choices(output: Any, members: Tensor | None, labels: Tensor | None) -> Any:  # noqa: ANN401
    if members is None:
        return output
    scores: Tensor = output.logits.reshape(-1)
    rows, places = int(members[-1, 0]) + 1, int(members[:, 1].max()) + 1
    # Not minus infinity: a difference of two of them is no number.
    table = scores.new_full((rows, places), torch.finfo(scores.dtype).min / 2)
    table = table.index_put((members[:, 0], members[:, 1]), scores)
    loss = None if labels is None else functional.cross_entropy(table.float(), labels)
    return replace(output, loss=loss, logits=table)


def _vectors(output: Any, members: Tensor | None, labels: Tensor | None) -> EmbeddingOutput:  # noqa: ANN401
    vectors: Tensor = output.last_hidden_state.squeeze(1)
    if labels is None or members is None:
        return EmbeddingOutput(embeddings=vectors)
    unit = functional.normalize(vectors.float(), dim=-1)
    first, second = unit[members[:, 1] == 0], unit[members[:, 1] == 1]
    if labels.is_floating_point():
        loss = functional.mse_loss((first * second).sum(-1), labels)
    else:
        loss = functional.cross_entropy(SCALE * first @ second.T, labels)
    return EmbeddingOutput(loss, vectors)


def _change(model: PreTrainedModel, name: str, finish: Callable[..., Any]) -> None:
    model.__class__ = _changed(type(model), name, finish)


def _changed(base: type[nn.Module], name: str, finish: Callable[..., Any]) -> type:
    held = _CLASSES.get((base, name))
    if held is not None:
        return held
    signature = inspect.signature(base.forward)

    def forward(
        self: nn.Module, *args: Any, members: Tensor | None = None,  # noqa: ANN401
        labels: Tensor | None = None, **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        return finish(base.forward(self, *args, **kwargs), members, labels)

    forward.__signature__ = _with_own(signature)  # pyright: ignore[reportFunctionMemberAccess]
    # transformers keys what it can record of a model by the printed class, so that stays.
    made = type(base.__name__, (base,), {
        "forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__,
        "__doc__": base.__doc__, "accepts_loss_kwargs": False,
        "__reduce_ex__": lambda self, _: (_rebuilt, (base, name), self.__dict__),
    })
    _CLASSES[base, name] = made
    return made


def _with_own(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature with ``members`` and ``labels`` as keywords."""
    kept = [each for key, each in signature.parameters.items() if key not in _OWN]
    rest = [each for each in kept if each.kind is inspect.Parameter.VAR_KEYWORD]
    own = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None) for key in _OWN]
    return signature.replace(parameters=[*(p for p in kept if p not in rest), *own, *rest])


def _rebuilt(base: type[nn.Module], name: str) -> nn.Module:
    """Return an empty instance, for deepcopy and the serialisers of torch."""
    finish = {"choose": _choices, "embed": _vectors}[name]
    made: type[nn.Module] = _changed(base, name, finish)
    return made.__new__(made)

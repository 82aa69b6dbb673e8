"""A BERT layer from its formulas, with places for what a technique changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

__all__ = ["Change", "bottleneck", "classify", "tensors_under"]


def _none(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _no_rows(x: Tensor) -> tuple[Tensor, Tensor] | None:
    return None


def _sum(x: Tensor, z: Tensor, norm: nn.Module) -> Tensor:
    return norm(x + z)


@dataclass
class Change:
    """What one layer adds.

    Attributes:
        query: added to the query of x; ``value`` likewise.
        rows: keys and values (batch, rows, d) that stand before those of x.
        ffn: the end of the layer from its input x, its FFN's result z and its norm.
    """

    query: Callable[[Tensor], Tensor] = _none
    value: Callable[[Tensor], Tensor] = _none
    rows: Callable[[Tensor], tuple[Tensor, Tensor] | None] = _no_rows
    ffn: Callable[[Tensor, Tensor, nn.Module], Tensor] = _sum


def bottleneck(tensors: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor]
               ) -> Callable[[Tensor], Tensor]:
    """Return ``phi(x W_d^T + b_d) W_u^T + b_u``."""
    down, up = tensors["down.weight"], tensors["up.weight"]
    return lambda x: activation(x @ down.T + tensors["down.bias"]) @ up.T + tensors["up.bias"]


def tensors_under(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``start``, without it."""
    found = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    assert found, (start, list(tensors))
    return found


def classify(model: BertForSequenceClassification, batch: Mapping[str, Tensor],
             changes: list[Change]) -> Tensor:
    """Return the logits of a bare model whose layers are changed; no dropout."""
    x = model.bert.embeddings(input_ids=batch["input_ids"])
    heads = model.config.num_attention_heads
    for layer, change in zip(model.bert.encoder.layer, changes, strict=True):
        own = layer.attention.self
        query, key = own.query(x) + change.query(x), own.key(x)
        value, mask = own.value(x) + change.value(x), batch["attention_mask"].bool()
        rows = change.rows(x)
        if rows is not None:
            key, value = torch.cat((rows[0], key), 1), torch.cat((rows[1], value), 1)
            mask = torch.cat((torch.ones(len(x), rows[0].shape[1], dtype=torch.bool), mask), 1)
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2)
                             for t in (query, key, value))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = layer.attention.output.LayerNorm(layer.attention.output.dense(mixed) + x)
        z = layer.output.dense(nn.functional.gelu(layer.intermediate.dense(x)))
        x = change.ffn(x, z, layer.output.LayerNorm)
    return model.classifier(torch.tanh(model.bert.pooler.dense(x[:, 0])))

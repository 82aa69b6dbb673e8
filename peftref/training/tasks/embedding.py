"""Vectors of texts: near where texts mean the same."""

# Models, tokenizers and outputs share no types.
# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from peftref.errors import DataError
from peftref.training.columns import Columns, ask, infer_text, need_label
from peftref.training.encode import Collate, Encoded, GroupCollator, Row, encode_texts
from peftref.training.example import Example
from peftref.training.heads import SCALE, embed
from peftref.training.metrics import correlations, retrieval_scores
from peftref.training.pooling import embedding_pooling, set_pooling
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings, Pooling
from peftref.training.tasks.base import Named, Place, Setup, Task, tasks, text_of
from peftref.training.tasks.regression import quantity, spread

__all__ = ["Retrieval", "Similarity"]

_BLOCK = 1024  # rows that are compared with all others at once


class Embedding(Task):
    """What both tasks on vectors of texts have in common: two texts, each read alone."""

    head = "features"
    metrics = ("spearman", "pearson", "loss")

    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Read the texts; to be embedded, one text is enough."""
        text = text_of(row, columns.text, place)
        alone = names is None and row.get(columns.pair or "") is None
        return Example(text, None if alone else text_of(row, columns.pair, place))

    def outputs(self, names: Sequence[str]) -> int | None:
        """A vector, no classes."""
        return None

    def shape(
        self, model: PreTrainedModel, pooling: Pooling, source: str, *, trained_pooler: bool
    ) -> tuple[Pooling, tuple[str, ...]]:
        """Return one vector a text."""
        resolved, reason = embedding_pooling(model, pooling, source)
        set_pooling(model, resolved)
        embed(model)
        return resolved, (reason,)

    def encode(self, examples: Sequence[Example], setup: Setup) -> Encoded:
        """Tokenise both texts of a row, each alone."""
        groups = [
            [each.text] if each.pair is None else [each.text, each.pair] for each in examples
        ]
        coded, cut = encode_texts(
            [text for group in groups for text in group], None, setup.processor, setup.max_length
        )
        rows: list[Row] = []
        truncated, start = 0, 0
        for group, example in zip(groups, examples, strict=True):
            part = coded[start:start + len(group)]
            truncated += any(cut[start:start + len(group)])
            start += len(group)
            row: dict[str, Any] = {name: [each[name] for each in part] for name in part[0]}
            rows.append(row if example.label is None else row | {"labels": example.label})
        lengths = tuple(max(map(len, row["input_ids"])) for row in rows)
        return Encoded(tuple(rows), truncated, lengths)

    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Vectors of unit length, one or two a row."""
        unit = functional.normalize(result.embeddings.float(), dim=-1)
        counts = inputs["members"][:, 0].bincount().tolist()
        return unit.split(counts)

    def answer(self, example: Example, output: Tensor, setup: Setup) -> dict[str, Any]:
        """The vector of a text, or how near two texts are."""
        if example.pair is None:
            return {"embedding": [round(value, 6) for value in output[0].tolist()]}
        return {"similarity": round(float(output[0] @ output[1]), 6)}


@tasks.register("similarity")
class Similarity(Embedding):
    """The cosine of two texts' vectors should be the label."""

    name = "similarity"
    meanings = ("text", "pair", "label")

    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Find both texts and the label."""
        label = need_label(table, data)
        return Columns(self.name, *_texts(table, data, label), label)

    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Read the texts and how near they should be."""
        found = super().example(row, columns, names, place)
        if names is None or columns.label is None:
            return found
        value = quantity(row.get(columns.label), place)
        if not -1.0 <= value <= 1.0:
            raise DataError(
                f"{place.name}: a cosine lies between -1 and 1, not {value:g}; divide column "
                f"{columns.label!r} by its greatest value"
            )
        return Example(found.text, found.pair, value)

    def describe(self, examples: Sequence[Example], names: Sequence[str]) -> list[str]:
        """Tell the range of labels."""
        return spread(examples)

    def collator(self, setup: Setup) -> GroupCollator:
        """Labels are quantities."""
        return GroupCollator(setup.processor.pad_token_id, labels=torch.float32)

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """Correlation of cosines and labels."""
        said = [float(output[0] @ output[1]) for output in outputs]
        return {"loss": loss} | correlations([row["labels"] for row in rows], said)


@tasks.register("retrieval")
class Retrieval(Embedding):
    """A text should be nearer to its pair than to the pairs of the other rows of its batch."""

    name = "retrieval"
    meanings = ("text", "pair")
    metrics = ("recall_at_1", "mrr", "loss")

    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Find both texts."""
        return Columns(self.name, *_texts(table, data, None))

    def collator(self, setup: Setup) -> Collate:
        """The right pair of a row is the one at its own place in the batch."""
        group = GroupCollator(setup.processor.pad_token_id)

        def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
            return group(rows) | {"labels": torch.arange(len(rows))}

        return collate

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """Ranks and loss among the pairs of all rows, so that no batch decides."""
        first = torch.stack([output[0] for output in outputs])
        second = torch.stack([output[1] for output in outputs])
        ranks: list[int] = []
        total = 0.0
        for start in range(0, len(first), _BLOCK):
            cosines = first[start:start + _BLOCK] @ second.T
            right = torch.arange(start, start + len(cosines))
            own = cosines[torch.arange(len(cosines)), right].unsqueeze(1)
            # Equal pairs are no mistake, also where their sums are not the same to the bit.
            ranks += (1 + (cosines > own + 1e-6).sum(1)).tolist()
            total += float(functional.cross_entropy(SCALE * cosines, right, reduction="sum"))
        return {"loss": total / len(first)} | retrieval_scores(ranks)


def _texts(table: Table, data: DataSettings, label: str | None) -> tuple[str, str]:
    text, pair = infer_text(table, data, {label})
    if pair is None:
        raise ask(table, "pair")
    return text, pair

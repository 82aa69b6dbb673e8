"""What tasks on one text or a pair of texts have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from peftref.training.columns import Columns, infer_text, need_label
from peftref.training.encode import Encoded, encode_texts
from peftref.training.example import Example, Label
from peftref.training.pooling import choose_pooling, set_pooling
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings, Pooling
from peftref.training.tasks.base import Named, Place, Setup, Task, text_of

__all__ = ["TextTask"]


class TextTask(Task):
    """A label or a quantity for a text or a pair, read from one pooled vector."""

    meanings = ("text", "pair", "label")

    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Find text, pair and label."""
        label = need_label(table, data)
        text, pair = infer_text(table, data, {label})
        return Columns(self.name, text, pair, label, separator=data.separator)

    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Read the texts, and the label by `label`."""
        text = text_of(row, columns.text, place)
        pair = text_of(row, columns.pair, place) if columns.pair else None
        if names is None or columns.label is None:
            return Example(text, pair)
        return Example(text, pair, self.label(row.get(columns.label), columns, names, place))

    def label(self, cell: Cell, columns: Columns, names: Named, place: Place) -> Label:
        """Return the label in a cell."""
        raise NotImplementedError

    def shape(
        self, model: PreTrainedModel, pooling: Pooling, source: str, *, trained_pooler: bool
    ) -> tuple[Pooling, tuple[str, ...]]:
        """Choose what the head reads."""
        resolved, reason = choose_pooling(model, pooling, source, trained_pooler=trained_pooler)
        set_pooling(model, resolved)
        return resolved, (reason,)

    def encode(self, examples: Sequence[Example], setup: Setup) -> Encoded:
        """Tokenise texts, or pairs as the tokenizer joins them."""
        texts = [example.text for example in examples]
        pairs = [example.pair or "" for example in examples] if setup.columns.pair else None
        coded, cut = encode_texts(texts, pairs, setup.processor, setup.max_length)
        rows = [row | self.labels(each, setup) for row, each in zip(coded, examples, strict=True)]
        return Encoded.of(rows, sum(cut))

    def labels(self, example: Example, setup: Setup) -> dict[str, Any]:
        """Return the label as it stands in an encoded row."""
        return {} if example.label is None else {"labels": example.label}

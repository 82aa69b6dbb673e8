"""Which of several texts goes with a text."""

# Models, tokenizers and outputs share no types.
# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from peftref.errors import DataError
from peftref.training.columns import Columns, ask, infer_choices, infer_text, label_key, need_label
from peftref.training.encode import Encoded, GroupCollator, Row, encode_texts
from peftref.training.example import Example
from peftref.training.heads import choose_one
from peftref.training.metrics import retrieval_scores
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings, Pooling
from peftref.training.tasks.base import Named, Place, Setup, tasks, text_of
from peftref.training.tasks.texts import TextTask

__all__ = ["MultipleChoice"]

CONTEXTS = (
    "premise", "context", "ctx", "passage", "question", "goal", "startphrase", "sent1", "sentence",
    "text",
)
ANSWERS = ("label", "labels", "answer", "answerKey", "correct", "target")


@tasks.register("multiple_choice")
class MultipleChoice(TextTask):
    """One of several texts, each scored together with ``text``; rows may differ in their number.

    Choices are a column of lists or a column each. The label is a number from 0 on, or the right
    choice itself.
    """

    name = "multiple_choice"
    head = "regression"  # one score a text and choice
    meanings = ("text", "choices", "label")
    metrics = ("accuracy", "mrr", "loss")

    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Find text, choices and label."""
        choices = infer_choices(table, data)
        if not choices:
            raise ask(table, "choices")
        label = need_label(table, data, ANSWERS)
        text, _ = infer_text(table, data, {label, *choices}, CONTEXTS)
        return Columns(self.name, text, label=label, choices=choices)

    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Read the text, its choices and which is right."""
        text = text_of(row, columns.text, place)
        first = row.get(columns.choices[0])
        if isinstance(first, list):
            choices = tuple(map(str, first))
        else:
            choices = tuple(text_of(row, name, place) for name in columns.choices)
        if len(choices) < 2:
            raise DataError(f"{place.name}: a choice needs two texts or more, not {len(choices)}")
        if names is None or columns.label is None:
            return Example(text, choices=choices)
        return Example(text, None, _right(row.get(columns.label), choices, place), (), choices)

    def stratum(self, example: Example) -> Hashable:
        """The place of the right choice says nothing of the row."""
        return None

    def describe(self, examples: Sequence[Example], names: Sequence[str]) -> list[str]:
        """Tell how many choices rows have, and what always saying one place would reach."""
        sizes = sorted({len(each.choices) for each in examples})
        places = [each.label for each in examples]
        most = max(places.count(place) for place in set(places)) / len(places)
        return [f"choices a row: {', '.join(map(str, sizes))}; the place that is right most often "
                f"is so in {most:.1%} of the train rows"]

    def outputs(self, names: Sequence[str]) -> int | None:
        """One."""
        return None

    def shape(
        self, model: PreTrainedModel, pooling: Pooling, source: str, *, trained_pooler: bool
    ) -> tuple[Pooling, tuple[str, ...]]:
        """Choose what the head reads, and compare its scores within a row."""
        found = super().shape(model, pooling, source, trained_pooler=trained_pooler)
        choose_one(model)
        return found

    def encode(self, examples: Sequence[Example], setup: Setup) -> Encoded:
        """Tokenise the text with each choice."""
        texts = [each.text for each in examples for _ in each.choices]
        choices = [choice for each in examples for choice in each.choices]
        coded, cut = encode_texts(texts, choices, setup.processor, setup.max_length)
        rows: list[Row] = []
        lengths: list[int] = []
        truncated, start = 0, 0
        for example in examples:
            end = start + len(example.choices)
            part = coded[start:end]
            row = {name: [each[name] for each in part] for name in part[0]}
            rows.append(row | self.labels(example, setup))
            lengths.append(max(len(tokens) for tokens in row["input_ids"]))
            truncated += any(cut[start:end])
            start = end
        return Encoded(tuple(rows), truncated, tuple(lengths))

    def collator(self, setup: Setup) -> GroupCollator:
        """Choices under each other."""
        return GroupCollator(setup.processor.pad_token_id)

    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Scores of the choices of each row."""
        counts = inputs["members"][:, 0].bincount().tolist()
        return [row[:count] for row, count in zip(result.logits, counts, strict=True)]

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """Accuracy, and the mean of one over the rank of the right choice."""
        ranks = [
            1 + int((output > output[row["labels"]]).sum())
            for row, output in zip(rows, outputs, strict=True)
        ]
        found = retrieval_scores(ranks)
        return {"loss": loss, "accuracy": found["recall_at_1"], "mrr": found["mrr"]}

    def answer(self, example: Example, output: Tensor, setup: Setup) -> dict[str, Any]:
        """The likeliest choice: its place, its text, its probability."""
        chances = output.softmax(-1)
        best = int(chances.argmax())
        return {
            "label": best, "choice": example.choices[best],
            "probability": round(float(chances[best]), 6),
        }


def _right(cell: Cell, choices: tuple[str, ...], place: Place) -> int:
    """Return the place of the right choice."""
    if isinstance(cell, str) and choices.count(cell) == 1:
        return choices.index(cell)
    key = label_key(cell)
    if key.isdecimal() and int(key) < len(choices):
        return int(key)
    raise DataError(
        f"{place.name}: the label must be the right choice or its number from 0 to "
        f"{len(choices) - 1}, not {cell!r}"
    )

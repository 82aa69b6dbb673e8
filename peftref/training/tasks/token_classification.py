"""A label for each word: names, slots, parts of speech."""

# Models, tokenizers and outputs share no types.
# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peftref.errors import DataError
from peftref.training.columns import LABELS, Columns, infer_text, need_label
from peftref.training.encode import IGNORED, Encoded, Row, encode_texts
from peftref.training.example import Example
from peftref.training.metrics import tag_scores
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings
from peftref.training.tasks.base import Named, Place, Setup, Task, class_number, tasks

__all__ = ["TAGS", "TokenClassification"]

TAGS = ("tags", "ner_tags", "slots", "pos_tags", "labels")
WORDS = ("tokens", "words", "text", "sentence")
OUTSIDE = "O"


@tasks.register("token_classification")
class TokenClassification(Task):
    """A label for each word, read at the first token of the word.

    Text and label columns hold lists of one length.
    """

    name = "token_classification"
    head = "token_classification"
    meanings = ("text", "label")
    metrics = ("f1", "precision", "recall", "accuracy", "loss")
    words = True

    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Find words and tags."""
        label = need_label(table, data, (*TAGS, *LABELS))
        text, _ = infer_text(table, data, {label}, WORDS)
        return Columns(self.name, text, label=label)

    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Read words, and as many tags."""
        words = row.get(columns.text or "")
        if isinstance(words, str) and names is None:
            words = words.split()
        if not isinstance(words, list):
            raise DataError(
                f"{place.name}: column {columns.text!r} must hold a list of words, not {words!r}"
            )
        cut = tuple(map(str, words))
        if names is None or columns.label is None:
            return Example(words=cut)
        tags = row.get(columns.label)
        if not isinstance(tags, list) or len(tags) != len(words):
            found = f"{len(tags)} labels" if isinstance(tags, list) else repr(tags)
            raise DataError(
                f"{place.name}: column {columns.label!r} must hold a list with a label for each "
                f"of the {len(words)} words, not {found}"
            )
        return Example(words=cut, label=tuple(class_number(tag, names, place) for tag in tags))

    def labels_in(self, cell: Cell, columns: Columns) -> tuple[Cell, ...]:
        """A cell is a list of labels."""
        return tuple(cell) if isinstance(cell, list) else (cell,)

    def counted(self, example: Example) -> tuple[int, ...]:
        """Each word counts."""
        return example.label if isinstance(example.label, tuple) else ()

    def encode(self, examples: Sequence[Example], setup: Setup) -> Encoded:
        """Tokenise words; a label stands at the first token of its word."""
        words = [list(example.words) for example in examples]
        tokenizer = setup.processor
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} does not tell which token belongs to which word; "
                "token_classification needs a tokenizer.json"
            )
        coded, cut = encode_texts(
            words, None, tokenizer, setup.max_length, is_split_into_words=True
        )
        rows: list[Row] = []
        for row, example, held in zip(
            coded, examples, _word_numbers(tokenizer, words, setup.max_length), strict=True
        ):
            firsts = _first_tokens(held)
            labels = [IGNORED] * len(held)
            tags = example.label if isinstance(example.label, tuple) else None
            for word, token in firsts.items():
                # Where tags are to be predicted, the number only says which tokens to read.
                labels[token] = word if tags is None else tags[word]
            rows.append(row | {"labels": labels})
        return Encoded.of(rows, sum(cut))

    def weight(self, inputs: Mapping[str, Tensor]) -> int:
        """Words."""
        return int((inputs["labels"] != IGNORED).sum())

    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Scores of every token, (T, C) a row."""
        return list(result.logits)

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """F1, precision and recall of entities; accuracy of words."""
        true: list[list[str]] = []
        said: list[list[str]] = []
        for row, output in zip(rows, outputs, strict=True):
            best = output.argmax(-1).tolist()
            kept = [index for index, label in enumerate(row["labels"]) if label != IGNORED]
            true.append([setup.names[row["labels"][index]] for index in kept])
            said.append([setup.names[best[index]] for index in kept])
        return {"loss": loss} | tag_scores(true, said)

    def answer(self, example: Example, output: Tensor, setup: Setup) -> dict[str, Any]:
        """A tag for each word; a word that was cut off has the tag that says nothing."""
        words = [list(example.words)]
        (held,) = _word_numbers(setup.processor, words, setup.max_length)
        rest = OUTSIDE if OUTSIDE in setup.names else None
        tags: list[str | None] = [rest] * len(example.words)
        best = output.argmax(-1).tolist()
        for word, token in _first_tokens(held).items():
            tags[word] = setup.names[best[token]]
        return {"words": list(example.words), "labels": tags}


def _word_numbers(
    tokenizer: Any, words: list[list[str]], limit: int
) -> list[list[int | None]]:
    coded = tokenizer(words, truncation=True, max_length=limit, is_split_into_words=True)
    return [coded.word_ids(index) for index in range(len(words))]


def _first_tokens(numbers: Sequence[int | None]) -> dict[int, int]:
    """Return the first token of each word."""
    found: dict[int, int] = {}
    for token, word in enumerate(numbers):
        if word is not None:
            found.setdefault(word, token)
    return found

"""What the columns of a table mean, and how they are found by name and value."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peftref.errors import DataError
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings

__all__ = [
    "LABELS", "Columns", "ask", "first_named", "infer_choices", "infer_image", "infer_text",
    "label_key", "need_label",
]

PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("question", "sentence"), ("query", "passage"),
    ("anchor", "positive"),
)
TEXTS = ("text", "sentence", "question", "content", "review", "utterance", "document", "tokens")
LABELS = ("label", "labels", "class", "category", "intent", "sentiment", "score", "target")
IMAGES = ("image", "img", "picture", "pixels", "file_name")
CHOICES = ("choices", "options", "endings", "answers")
CHOICE = re.compile(r"(choice|option|ending|answer|sol)[_ ]?(\d+|[a-h])", re.IGNORECASE)
MEANINGS = ("text", "pair", "label", "target", "image", "choices")


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names by meaning, and the task.

    ``target`` is the text that a language model learns to write after, or for, ``text``;
    ``choices`` is one column of lists or a column for each choice.
    """

    task: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    target: str | None = None
    image: str | None = None
    choices: tuple[str, ...] = ()
    separator: str | None = None

    @classmethod
    def of(cls, stated: Mapping[str, Any]) -> Columns:
        """Return the columns that an artifact names."""
        values: dict[str, Any] = {**stated, "choices": tuple(stated.get("choices", ()))}
        return cls(**values)

    @property
    def shown(self) -> tuple[str, ...]:
        """The columns that the model is shown."""
        return tuple(name for name in (self.text, self.pair, self.image, *self.choices) if name)

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that every row must fill."""
        return (*self.shown, *(name for name in (self.label, self.target) if name))

    def __str__(self) -> str:
        named = [f"{key}={getattr(self, key)!r}" for key in MEANINGS if getattr(self, key)]
        return f"{self.task}: {', '.join(named)}"


def infer_text(
    table: Table, data: DataSettings, taken: Collection[str | None],
    names: tuple[str, ...] = TEXTS,
) -> tuple[str, str | None]:
    """Return the column of the text and, if there is one, of the second text.

    Args:
        table: training rows.
        data: names that are given count.
        taken: columns that mean something else.
        names: what texts of the task are called, the likeliest first.

    Raises:
        DataError: inference is not certain.
    """
    if data.text is not None:
        return data.text, data.pair
    if data.pair is not None:
        raise DataError("'pair' names the second text; name the first one as 'text' too")
    for first, second in PAIRS:
        if first in table.columns and second in table.columns and not {first, second} & set(taken):
            return first, second
    free = [name for name in table.columns if name not in taken]
    by_name = first_named(names, free)
    if by_name is not None:
        return by_name, None
    strings = [
        name for name in free
        if all(isinstance(row.get(name), str) for row in table.rows[:100])
    ]
    if len(strings) != 1:
        raise ask(table, "text")
    return strings[0], None


def infer_choices(table: Table, data: DataSettings) -> tuple[str, ...]:
    """Return the columns of choices: one of lists, or one for each; nothing where none are."""
    if data.choices is not None:
        return data.choices
    listed = first_named(CHOICES, table.columns)
    if listed is not None and isinstance(table.rows[0].get(listed), list):
        return (listed,)
    numbered = [name for name in table.columns if CHOICE.fullmatch(name)]
    return tuple(numbered) if len(numbered) > 1 else ()


def infer_image(table: Table, data: DataSettings) -> str | None:
    """Return the column of pictures, if there is one."""
    return data.image or first_named(IMAGES, table.columns)


def need_label(table: Table, data: DataSettings, names: tuple[str, ...] = LABELS) -> str:
    """Return the column of the label.

    Raises:
        DataError: none is given or named as labels are.
    """
    label = data.label or first_named(names, table.columns)
    if label is None:
        raise ask(table, "label")
    return label


def label_key(value: Cell) -> str:
    """Return the name of a class: ``1``, ``1.0`` and ``"1"`` are one class, True is ``true``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def first_named(names: tuple[str, ...], columns: Iterable[str]) -> str | None:
    """Return the column with the first of these names that occurs, whatever its case."""
    by_lower = {column.lower(): column for column in reversed(list(columns))}
    return next((by_lower[name] for name in names if name in by_lower), None)


def ask(table: Table, meaning: str) -> DataError:
    """Return the error that asks for the name of a column."""
    return DataError(
        f"{table.source}: cannot tell which column is the {meaning}; columns: "
        f"{', '.join(table.columns)}. Name it with data.{meaning}"
    )

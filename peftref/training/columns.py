"""Which column is the text and which the label, and what task that makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from peftref.errors import DataError, unknown_name
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings, Task

__all__ = ["Columns", "infer_columns", "label_key"]

PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("question", "sentence"), ("query", "passage"),
)
TEXTS = ("text", "sentence", "question", "content", "review", "utterance", "document", "tokens")
LABELS = ("label", "labels", "class", "category", "intent", "sentiment", "score", "target")
# Whole numbers with more distinct values than this may be ratings or may be classes.
MOST_CLASSES = 50


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names by meaning, and the task.

    ``target`` is the continuation that a causal language model learns to write after ``text``.
    """

    task: Literal["classification", "regression", "causal_lm"]
    text: str
    pair: str | None = None
    label: str | None = None
    target: str | None = None

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that every row must fill."""
        return tuple(name for name in (self.text, self.pair, self.label, self.target) if name)

    def __str__(self) -> str:
        meanings = ("text", "pair", "label", "target")
        named = [f"{key}={getattr(self, key)!r}" for key in meanings if getattr(self, key)]
        return f"{self.task}: {', '.join(named)}"


def infer_columns(table: Table, data: DataSettings, task: Task) -> Columns:
    """Return the given columns, completed by inference from names and values.

    Raises:
        DataError: a given column is missing, or inference is not certain.
    """
    for meaning in ("text", "pair", "label", "target"):
        given = getattr(data, meaning)
        if given is not None and given not in table.columns:
            raise DataError(f"{table.source}: {unknown_name('column', given, table.columns)}")
    label = data.label
    if label is None and task != "causal_lm" and data.target is None:
        label = _first(LABELS, table.columns)
    if label is None and task in ("classification", "regression"):
        raise _ask(table, "label")
    resolved = task if task != "auto" else _task(table, label)
    if resolved == "causal_lm" and label is not None:
        raise DataError(f"task causal_lm has no label; name the column {label!r} as 'target'")
    if resolved != "causal_lm" and data.target is not None:
        raise DataError(f"'target' is for task causal_lm; task {resolved} takes 'label'")
    text, pair = _text(table, data, label)
    return Columns(resolved, text, pair, label, data.target)


def _text(table: Table, data: DataSettings, label: str | None) -> tuple[str, str | None]:
    if data.text is not None:
        return data.text, data.pair
    if data.pair is not None:
        raise DataError("'pair' names the second text; name the first one as 'text' too")
    taken = {label, data.target}
    for first, second in PAIRS:
        if first in table.columns and second in table.columns and not taken & {first, second}:
            return first, second
    by_name = _first(TEXTS, [name for name in table.columns if name not in taken])
    if by_name is not None:
        return by_name, None
    strings = [
        name for name in table.columns
        if name not in taken and all(isinstance(row.get(name), str) for row in table.rows[:100])
    ]
    if len(strings) != 1:
        raise _ask(table, "text")
    return strings[0], None


def _task(
    table: Table, label: str | None
) -> Literal["classification", "regression", "causal_lm"]:
    if label is None:
        return "causal_lm"
    values = {label_key(row.get(label)) for row in table.rows if row.get(label) not in (None, "")}
    numbers = [_number(value) for value in values]
    if any(number is None for number in numbers):
        return "classification"
    if any(number is not None and not number.is_integer() for number in numbers):
        return "regression"
    if len(values) > MOST_CLASSES:
        raise DataError(
            f"{table.source}: column {label!r} holds {len(values)} different whole numbers; say "
            "whether they are classes or quantities with task: classification or task: regression"
        )
    return "classification"


def label_key(value: Cell) -> str:
    """Return the name of a class: ``1``, ``1.0`` and ``"1"`` are one class, True is ``true``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _first(names: tuple[str, ...], columns: Iterable[str]) -> str | None:
    by_lower = {column.lower(): column for column in reversed(list(columns))}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _ask(table: Table, meaning: str) -> DataError:
    return DataError(
        f"{table.source}: cannot tell which column is the {meaning}; columns: "
        f"{', '.join(table.columns)}. Name it with data.{meaning}"
    )

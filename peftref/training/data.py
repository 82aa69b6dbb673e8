"""The data of one task: examples by split, label names, and what was found out about them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftref.errors import DataError
from peftref.training.columns import Columns, infer_columns, label_key
from peftref.training.rows import Cell, Table, read_splits
from peftref.training.settings import DataSettings, Task
from peftref.training.split import fingerprint, hold_out, shared

__all__ = ["Example", "TaskData", "examples_of", "load_data"]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a text or a pair, and its class number, quantity, continuation or nothing."""

    text: str
    pair: str | None = None
    label: int | float | str | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """What makes two rows the same text."""
        return self.text, self.pair


@dataclass(frozen=True, slots=True)
class TaskData:
    """Examples by split.

    Attributes:
        source: as given.
        columns: the meaning of the columns, and the task.
        splits: ``train``, ``validation`` and, if there is one, ``test``.
        label_names: class names, sorted; a class number indexes them.
        fingerprint: SHA-256 of all splits in order.
        notes: what a user should know (columns found, rows, repeated texts), as sentences.
    """

    source: str
    columns: Columns
    splits: Mapping[str, tuple[Example, ...]]
    label_names: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...]

    def split(self, name: str) -> tuple[Example, ...]:
        """Return the examples of a split.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.splits:
            raise DataError(
                f"{self.source} has no {name} split; it has {', '.join(self.splits)}"
            )
        return self.splits[name]


def load_data(data: DataSettings, task: Task) -> TaskData:
    """Read, check and split the data once.

    Raises:
        DataError: anything about files, columns, labels or values is wrong.
    """
    tables = read_splits(data.source)
    columns = infer_columns(tables["train"], data, task)
    names = _label_names(tables["train"], columns)
    splits = {
        name: examples_of(table, columns, names)
        for name, table in tables.items() if not _labels_withheld(table, columns, name)
    }
    splits = _complete(splits, data, columns)
    if data.limit is not None:
        splits["train"] = _limited(splits["train"], data.limit, data.seed)
    _check_learnable(data.source, splits["train"], columns)
    ordered = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
    notes = [f"columns: {columns}", *_describe(ordered, names)]
    notes += [f"the {name} labels are withheld; that split is left out"
              for name in tables if name not in ordered]
    every = (row for name, rows in ordered.items() for row in (name, *rows))
    return TaskData(data.source, columns, ordered, names, fingerprint(every), tuple(notes))


def examples_of(
    table: Table, columns: Columns, names: Sequence[str], *, labelled: bool = True
) -> tuple[Example, ...]:
    """Return the rows of a table as examples.

    Raises:
        DataError: a column or a value is missing, or a label was not seen in training.
    """
    learnt = (columns.label, columns.target)
    used = [name for name in columns.used if labelled or name not in learnt]
    absent = [name for name in used if name not in table.columns]
    if absent:
        raise DataError(
            f"{table.source}: no column {absent[0]!r}; columns: {', '.join(table.columns)}"
        )
    _check_filled(table, used)
    numbers = {name: index for index, name in enumerate(names)}
    examples: list[Example] = []
    for index, row in enumerate(table.rows):
        pair = _text(row[columns.pair]) if columns.pair else None
        label = _label(table, index, columns, numbers) if labelled else None
        examples.append(Example(_text(row[columns.text]), pair, label))
    return tuple(examples)


def _label(
    table: Table, index: int, columns: Columns, numbers: Mapping[str, int]
) -> int | float | str | None:
    row = table.rows[index]
    if columns.target is not None:
        return _text(row[columns.target])
    if columns.label is None:
        return None
    value = row[columns.label]
    if columns.task == "regression":
        return _quantity(table, index, value)
    key = label_key(value)
    if key not in numbers:
        raise DataError(
            f"{table.place(index)}: label {key!r} does not occur in the training rows; known "
            f"labels: {', '.join(numbers)}"
        )
    return numbers[key]


def _quantity(table: Table, index: int, value: Cell) -> float:
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]  # checked by the except
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{table.place(index)}: a regression label must be a number, not {value!r}")
    return number


def _label_names(table: Table, columns: Columns) -> tuple[str, ...]:
    if columns.task != "classification" or columns.label is None:
        return ()
    values = [row.get(columns.label) for row in table.rows]
    names = {label_key(value) for value in values if not _missing(value)}
    # Numbers sort as numbers: 10 after 9.
    return tuple(sorted(names, key=int if all(map(str.isdecimal, names)) else str))


def _labels_withheld(table: Table, columns: Columns, name: str) -> bool:
    if name == "train" or columns.label is None or columns.label not in table.columns:
        return False
    return all(_missing(row.get(columns.label)) for row in table.rows)


def _missing(value: Cell) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == []


def _check_filled(table: Table, used: Sequence[str]) -> None:
    for name in used:
        empty = [index for index, row in enumerate(table.rows) if _missing(row.get(name))]
        if empty:
            raise DataError(
                f"{table.place(empty[0])}: column {name!r} is empty here and in "
                f"{len(empty) - 1} more of {len(table.rows)} rows; fill or remove them"
            )


def _text(value: Cell) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _complete(
    splits: dict[str, tuple[Example, ...]], data: DataSettings, columns: Columns
) -> dict[str, tuple[Example, ...]]:
    """Take validation (and, from a single split, test) rows out of the training rows."""
    single = len(splits) == 1
    if single and data.test_fraction > 0:
        splits = _take(splits, "test", data.test_fraction, data.seed, columns)
    if "validation" not in splits:
        # The share is of all rows, also after the test rows are gone.
        rest = 1.0 - data.test_fraction if single else 1.0
        splits = _take(splits, "validation", data.validation_fraction / rest, data.seed, columns)
    return splits


def _take(
    splits: dict[str, tuple[Example, ...]], name: str, fraction: float, seed: int, columns: Columns
) -> dict[str, tuple[Example, ...]]:
    rows = splits["train"]
    strata = [row.label if columns.task == "classification" else None for row in rows]
    stay, held = hold_out([row.key for row in rows], strata, fraction, seed)
    if not held:
        raise DataError(
            f"{len(rows)} training rows are too few to hold out a {name} split; give more rows or "
            f"a {name} file"
        )
    return splits | {"train": tuple(rows[i] for i in stay), name: tuple(rows[i] for i in held)}


def _limited(rows: tuple[Example, ...], limit: int, seed: int) -> tuple[Example, ...]:
    if limit >= len(rows):
        return rows
    kept = sorted(random.Random(f"{seed}:limit").sample(range(len(rows)), limit))
    return tuple(rows[index] for index in kept)


def _check_learnable(source: str, rows: tuple[Example, ...], columns: Columns) -> None:
    if columns.label is None:
        return
    values = {row.label for row in rows}
    if len(values) < 2:
        raise DataError(
            f"{source}: all {len(rows)} training rows have the same value in column "
            f"{columns.label!r}; there is nothing to learn"
        )


def _describe(splits: Mapping[str, tuple[Example, ...]], names: Sequence[str]) -> list[str]:
    notes = ["rows: " + ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())]
    if names:
        counts = Counter(row.label for row in splits["train"])
        listed = ", ".join(f"{name} ({counts[index]})" for index, name in enumerate(names[:20]))
        more = f", and {len(names) - 20} more" if len(names) > 20 else ""
        notes.append(f"{len(names)} labels in train: {listed}{more}")
    for name, rows in splits.items():
        if name == "train":
            continue
        twice = shared((row.key for row in splits["train"]), (row.key for row in rows))
        if twice:
            notes.append(f"{twice} of {len(rows)} {name} texts also occur in train")
    return notes

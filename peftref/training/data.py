"""The data of one task: examples by split, label names, and what was found out about them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftref.errors import DataError
from peftref.training.columns import Columns, label_key
from peftref.training.example import Example
from peftref.training.recognise import infer_columns
from peftref.training.rows import Cell, Table, read_splits
from peftref.training.settings import DataSettings, Task
from peftref.training.split import fingerprint, hold_out, shared
from peftref.training.tasks.base import Place, task_of

__all__ = ["TaskData", "examples_of", "load_data"]


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
    kept = {name: table for name, table in tables.items()
            if not _labels_withheld(table, columns, name)}
    notes = [f"columns: {columns}"]
    if data.drop_missing:
        for name, table in kept.items():
            kept[name], note = _filled(table, columns)
            notes += [note] if note else []
    names = _label_names(kept["train"], columns)
    splits = {name: examples_of(table, columns, names) for name, table in kept.items()}
    splits = _complete(splits, data, columns)
    if data.limit is not None:
        splits["train"] = _limited(splits["train"], data.limit, data.seed)
    _check_learnable(data.source, splits["train"], columns)
    ordered = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
    notes += ["rows: " + ", ".join(f"{name} {len(rows)}" for name, rows in ordered.items())]
    notes += task_of(columns.task).describe(ordered["train"], names)
    notes += _repeated(ordered)
    notes += [f"the {name} labels are withheld; that split is left out"
              for name in tables if name not in ordered]
    every = (row for name, rows in ordered.items() for row in (name, *rows))
    return TaskData(data.source, columns, ordered, names, fingerprint(every), tuple(notes))


def examples_of(
    table: Table, columns: Columns, names: Sequence[str], *, labelled: bool = True
) -> tuple[Example, ...]:
    """Return the rows of a table as examples; without their labels if that is asked for.

    Raises:
        DataError: a column or a value is missing, or a label was not seen in training.
    """
    used = columns.used if labelled else columns.shown
    absent = [name for name in used if name not in table.columns]
    if absent:
        raise DataError(
            f"{table.source}: no column {absent[0]!r}; columns: {', '.join(table.columns)}"
        )
    for name, empty in _empty(table, columns, used).items():
        raise DataError(
            f"{table.place(empty[0])}: column {name!r} is empty here and in "
            f"{len(empty) - 1} more of {len(table.rows)} rows; fill or remove them, or leave them "
            "out with data.drop_missing"
        )
    task = task_of(columns.task)
    numbers = {name: index for index, name in enumerate(names)} if labelled else None
    source = Path(table.source).expanduser()
    folder = str(source.parent) if source.is_file() else ""
    return tuple(
        task.example(row, columns, numbers, Place(table.place(index), folder))
        for index, row in enumerate(table.rows)
    )


def _label_names(table: Table, columns: Columns) -> tuple[str, ...]:
    if columns.label is None:
        return ()
    task = task_of(columns.task)
    cells = [row.get(columns.label) for row in table.rows]
    values = [value for cell in cells for value in task.labels_in(cell, columns)]
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
    return value is None or value in ([], {})


def _empty(table: Table, columns: Columns, used: Sequence[str]) -> dict[str, list[int]]:
    """Return the numbers of the rows in which each used column is empty, where there are any."""
    found: dict[str, list[int]] = {}
    for name in used:
        label = name == columns.label and task_of(columns.task).may_be_empty
        held = [row.get(name) for row in table.rows]
        empty = [index for index, cell in enumerate(held)
                 if (cell is None if label else _missing(cell))]
        if empty:
            found[name] = empty
    return found


def _filled(table: Table, columns: Columns) -> tuple[Table, str]:
    """Return the table without the rows in which something is missing, and what was left out.

    Raises:
        DataError: nothing would be left.
    """
    empty = _empty(table, columns, columns.used)
    lost = {index for rows in empty.values() for index in rows}
    if not lost:
        return table, ""
    stay = [index for index in range(len(table.rows)) if index not in lost]
    counts = ", ".join(f"{name!r} in {len(rows)}" for name, rows in empty.items())
    if not stay:
        raise DataError(f"{table.source}: something is missing in every row: {counts}")
    kept = Table(
        table.source, table.columns, tuple(table.rows[index] for index in stay),
        tuple(table.lines[index] for index in stay),
    )
    return kept, (
        f"warning: {len(lost)} of {len(table.rows)} rows of {table.source} are left out, the first "
        f"is {table.place(min(lost))}; empty: {counts}"
    )


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
    strata = [task_of(columns.task).stratum(row) for row in rows]
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


def _repeated(splits: Mapping[str, tuple[Example, ...]]) -> list[str]:
    notes: list[str] = []
    for name, rows in splits.items():
        if name == "train":
            continue
        twice = shared((row.key for row in splits["train"]), (row.key for row in rows))
        if twice:
            kind = "pictures" if rows[0].picture else "texts"
            notes.append(f"{twice} of {len(rows)} {name} {kind} also occur in train")
    return notes

"""Which task the columns of a table make."""

from __future__ import annotations

from collections.abc import Collection

from peftref.errors import DataError, unknown_name
from peftref.training.columns import (
    LABELS,
    MEANINGS,
    Columns,
    first_named,
    infer_choices,
    infer_image,
    label_key,
)
from peftref.training.pictures import is_picture
from peftref.training.rows import Cell, Table
from peftref.training.settings import DataSettings, Task
from peftref.training.tasks.base import tasks
from peftref.training.tasks.token_classification import TAGS

__all__ = ["infer_columns"]

# Whole numbers with more distinct values than this may be ratings or may be classes.
MOST_CLASSES = 50


def infer_columns(table: Table, data: DataSettings, task: Task) -> Columns:
    """Return the given columns, completed by inference from names and values.

    Raises:
        DataError: a given column is missing, has no meaning for the task, or inference is not
            certain.
    """
    given = {meaning: getattr(data, meaning) for meaning in MEANINGS}
    for value in given.values():
        for name in (value,) if isinstance(value, str) else value or ():
            if name not in table.columns:
                raise DataError(f"{table.source}: {unknown_name('column', name, table.columns)}")
    resolved = task if task != "auto" else _guess(table, data)
    kind = tasks.get(resolved)()
    for meaning, value in given.items():
        if value is not None and meaning not in kind.meanings:
            raise DataError(
                f"'{meaning}' is for {_takers(meaning)}; task {resolved} takes "
                f"{', '.join(kind.meanings)}"
            )
    return kind.columns(table, data)


def _takers(meaning: str) -> str:
    names = [name for name in tasks.names() if meaning in tasks.get(name).meanings]
    return f"task {' or '.join(names)}"


def _guess(table: Table, data: DataSettings) -> str:
    """Return the task, from the columns that are given, their names and what stands in them."""
    row = table.rows[0]
    image = infer_image(table, data)
    if image is not None and is_picture(row.get(image)):
        return "image_classification"
    if infer_choices(table, data):
        return "multiple_choice"
    label = data.label
    if label is None and data.target is None:
        label = first_named(LABELS, table.columns) or _tags(table)
    if label is None:
        return "causal_lm"
    values = [each[label] for each in table.rows if each.get(label) not in (None, "", [])]
    if values and isinstance(values[0], list):
        return "token_classification" if _aligned(row, label) else "multilabel"
    return _single(table, label, {label_key(value) for value in values})


def _single(table: Table, label: str, values: Collection[str]) -> str:
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


def _tags(table: Table) -> str | None:
    found = first_named(TAGS, table.columns)
    return found if found is not None and _aligned(table.rows[0], found) else None


def _aligned(row: object, label: str) -> bool:
    """Whether the labels are as many as the words of some other column of lists."""
    assert isinstance(row, dict)
    cells: dict[str, Cell] = row
    tags = cells.get(label)
    return isinstance(tags, list) and any(
        isinstance(value, list) and name != label and len(value) == len(tags)
        for name, value in cells.items()
    )


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None

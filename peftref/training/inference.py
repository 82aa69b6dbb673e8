"""What a saved artifact is worth on data, and what it says about new rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peftref.errors import ArtifactError, DataError
from peftref.training.columns import Columns
from peftref.training.data import examples_of, load_data
from peftref.training.encode import Collate, Row
from peftref.training.example import Example
from peftref.training.restore import Opened
from peftref.training.rows import Cell, read_splits
from peftref.training.scoring import score_rows
from peftref.training.settings import DataSettings
from peftref.training.tasks.base import Place, Setup, task_of

__all__ = ["Evaluated", "collator_of", "evaluate_artifact", "predict_rows", "rows_of"]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Scores of a split: its name, its rows, and loss and metrics."""

    split: str
    rows: int
    metrics: Mapping[str, float]


def evaluate_artifact(
    opened: Opened, source: str | None, split: str | None, *, batch_size: int = 64
) -> Evaluated:
    """Score an artifact.

    Args:
        opened: the artifact on its backbone.
        source: data as in a run file; None: what it was trained on, split as then. A single file
            is scored whole.
        split: None: ``test``, or ``validation`` where there is no test.
        batch_size: rows at once.

    Raises:
        DataError: the data lack a column, a value or the split, or have unknown labels.
    """
    name, examples = _examples(opened, source, split)
    task, setup = task_of(opened.head.task), _setup(opened)
    encoded = task.encode(examples, setup)
    metrics = score_rows(opened.model, encoded, task, setup, batch_size)
    metrics |= task.measure_written(opened.model, examples, setup, batch_size)
    return Evaluated(name, len(examples), metrics)


def _examples(
    opened: Opened, source: str | None, split: str | None, *, labelled: bool = True
) -> tuple[str, tuple[Example, ...]]:
    metadata = opened.artifact.metadata
    run: Mapping[str, Any] = metadata.get("run", {})
    if source is None and "data" not in run:
        path = opened.artifact.path
        raise DataError(f"{path} does not say what it was trained on; name the data")
    if source is None or source == run.get("data", {}).get("source"):
        task: Any = opened.head.task
        data = load_data(DataSettings.model_validate(run["data"]), task)
        known = metadata.get("data", {}).get("fingerprint")
        if known is not None and known != data.fingerprint:
            raise DataError(
                f"{data.source} is not what it was in training, so its {split or 'test'} rows may "
                "have been trained on; name other data"
            )
        name = _pick(split, data.splits)
        return name, data.split(name)
    tables = read_splits(source)
    columns = columns_of(opened)
    whole = split is None and list(tables) == ["train"] and Path(source).is_file()
    name = "all" if whole else _pick(split, tables)
    if not whole and name not in tables:
        raise DataError(f"{source} has no {name} split; it has {', '.join(tables)}")
    table = tables["train" if whole else name]
    return name, examples_of(table, columns, opened.head.label_names, labelled=labelled)


def _pick(split: str | None, known: Iterable[str]) -> str:
    return split or ("test" if "test" in known else "validation")


def columns_of(opened: Opened) -> Columns:
    """Return the columns that the artifact was trained on.

    Raises:
        ArtifactError: it was saved without them.
    """
    stated = opened.artifact.metadata.get("columns")
    if stated is None:
        raise ArtifactError(f"{opened.artifact.path} does not say which columns it was trained on")
    return Columns.of(stated)


def rows_of(
    opened: Opened, source: str | None, split: str | None, *, labelled: bool = True
) -> Sequence[Row]:
    """Return the encoded rows of a split, found as `evaluate_artifact` finds them."""
    _, examples = _examples(opened, source, split, labelled=labelled)
    return task_of(opened.head.task).encode(examples, _setup(opened)).rows


def collator_of(opened: Opened) -> Collate:
    """Return what makes a batch of encoded rows."""
    return task_of(opened.head.task).collator(_setup(opened))


def _setup(opened: Opened) -> Setup:
    length = int(opened.artifact.metadata.get("max_length", 128))
    return Setup(opened.tokenizer, columns_of(opened), opened.head.label_names, length)


def predict_rows(
    opened: Opened, rows: Iterable[Mapping[str, Any]], *, batch_size: int = 64, tokens: int = 64
) -> Iterator[dict[str, Any]]:
    """Yield each row with what the model says of it, in order; docs/tasks.md says how.

    Args:
        opened: the artifact on its backbone.
        rows: mappings with the columns that the model was shown in training; paths of pictures
            start from the current folder.
        batch_size: rows at once.
        tokens: longest text that is written.

    Raises:
        DataError: a row lacks what the model is shown.
    """
    task, setup = task_of(opened.head.task), _setup(opened)
    done = 0
    queue = iter(rows)
    while chunk := list(islice(queue, batch_size * 8)):
        examples: list[Example] = []
        for number, row in enumerate(chunk, start=done + 1):
            cells: Mapping[str, Cell] = row
            examples.append(task.example(cells, setup.columns, None, Place(f"row {number}")))
        done += len(chunk)
        said = task.predict(opened.model, examples, setup, batch_size, tokens)
        for row, answer in zip(chunk, said, strict=True):
            yield {**row, **answer}

"""What a task is: one class, one file, found by its name.

A task says which columns it needs, what a row means, how examples become tensors, which head the
model ends in, what is measured and what a prediction looks like. Loading, training, scoring and
predicting ask it and know no task by name.
"""

# Models, tokenizers and outputs share no types.
# ruff: noqa: ANN401

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from peftref.backbone import hf
from peftref.errors import DataError
from peftref.registry import Registry
from peftref.training.columns import Columns, label_key
from peftref.training.encode import Collate, Collator, Encoded, Row
from peftref.training.example import Example
from peftref.training.rows import Cell, Table
from peftref.training.scoring import row_outputs
from peftref.training.settings import DataSettings, Pooling

__all__ = ["Named", "Place", "Setup", "Task", "class_number", "task_of", "tasks", "text_of"]

Named = Mapping[str, int]
_RARE = 0.1  # of an even share


@dataclass(frozen=True, slots=True)
class Setup:
    """What turns examples into tensors and outputs into words.

    Attributes:
        processor: tokenizer, or image processor.
        columns: the meaning of the columns.
        names: class names; a class number indexes them.
        max_length: longest sequence in tokens.
    """

    processor: Any
    columns: Columns
    names: tuple[str, ...]
    max_length: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: its name in messages, and the folder that paths in it start from."""

    name: str
    folder: str = ""


class Task(ABC):
    """A kind of task; it has no state.

    Attributes:
        name: in run files.
        head: what the model must end in.
        meanings: columns that it takes.
        metrics: what is measured; the first is what a run is judged by.
        written: metrics that need the model to write, which takes time; they are measured when
            one of them is asked for, and by ``evaluate``.
        words: whether rows are cut into words already.
        sees_pictures: whether rows are pictures.
        may_be_empty: whether a row without any label is a row like others.
    """

    name: ClassVar[str]
    head: ClassVar[hf.Task]
    meanings: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]]
    written: ClassVar[tuple[str, ...]] = ()
    words: ClassVar[bool] = False
    sees_pictures: ClassVar[bool] = False
    may_be_empty: ClassVar[bool] = False

    # --- rows

    @abstractmethod
    def columns(self, table: Table, data: DataSettings) -> Columns:
        """Return what the columns mean, those that are given and those inferred.

        Raises:
            DataError: inference is not certain.
        """

    @abstractmethod
    def example(
        self, row: Mapping[str, Cell], columns: Columns, names: Named | None, place: Place
    ) -> Example:
        """Return what a row means.

        Args:
            row: every used column is filled.
            columns: their meaning.
            names: class numbers by name; None: the row is to be predicted and has no label.
            place: of the row.

        Raises:
            DataError: a cell is not what the task needs.
        """

    def labels_in(self, cell: Cell, columns: Columns) -> tuple[Cell, ...]:
        """Return the class labels in a cell of the label column."""
        return ()

    def stratum(self, example: Example) -> Hashable:
        """Return what must occur in every split, such as the class."""
        return None

    def counted(self, example: Example) -> tuple[int, ...]:
        """Return the class numbers that an example counts for in the report."""
        return ()

    def describe(self, examples: Sequence[Example], names: Sequence[str]) -> list[str]:
        """Return what a user should know about the labels of the training rows."""
        if not names:
            return []
        counts = Counter(number for each in examples for number in self.counted(each))
        listed = ", ".join(f"{name} ({counts[index]})" for index, name in enumerate(names[:20]))
        more = f", and {len(names) - 20} more" if len(names) > 20 else ""
        notes = [f"{len(names)} labels in train: {listed}{more}"]
        total, even = counts.total(), counts.total() / len(names)
        rare = [index for index in range(len(names)) if counts[index] < _RARE * even]
        if rare:
            named = ", ".join(
                f"{names[index]!r} ({counts[index]} of {total}, {counts[index] / total:.2%})"
                for index in rare[:5]
            )
            rest = f", and {len(rare) - 5} more" if len(rare) > 5 else ""
            notes.append(
                f"warning: rare labels, below a tenth of an even share: {named}{rest}; a mean over "
                "all rows hardly sees them"
            )
        return notes

    # --- the model

    def outputs(self, names: Sequence[str]) -> int | None:
        """Return how many outputs the head has; None where it has none to choose."""
        return len(names)

    def shape(
        self, model: PreTrainedModel, pooling: Pooling, source: str, *, trained_pooler: bool
    ) -> tuple[Pooling, tuple[str, ...]]:
        """Change the loaded model into what the task trains.

        Args:
            model: just loaded; it may be on the meta device.
            pooling: as asked for.
            source: its checkpoint.
            trained_pooler: whether that has the weights of a pooler.

        Returns:
            The pooling, and what a user should know, as sentences.

        Raises:
            BackboneError: the model cannot be changed so.
        """
        return "model", ()

    # --- tensors

    @abstractmethod
    def encode(self, examples: Sequence[Example], setup: Setup) -> Encoded:
        """Return the rows that batches are made of."""

    def collator(self, setup: Setup) -> Collate:
        """Return what makes a batch of rows."""
        return Collator(setup.processor.pad_token_id)

    # --- scores

    def weight(self, inputs: Mapping[str, Tensor]) -> int:
        """Return how many terms the loss of a batch is the mean of."""
        return len(inputs["labels"])

    @abstractmethod
    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Return what the model says of each row of a batch; nothing if only the loss counts."""

    @abstractmethod
    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """Return loss and metrics of labelled rows."""

    def measure_written(
        self, model: PreTrainedModel, examples: Sequence[Example], setup: Setup, batch: int
    ) -> dict[str, float]:
        """Return the metrics of ``written``."""
        return {}

    # --- predictions

    def predict(
        self, model: PreTrainedModel, examples: Sequence[Example], setup: Setup, batch: int,
        tokens: int,
    ) -> Iterator[dict[str, Any]]:
        """Yield what the model says of each row, in order.

        Args:
            model: in evaluation mode.
            examples: without labels.
            setup: as in training.
            batch: rows at once.
            tokens: longest text that is written.
        """
        encoded = self.encode(examples, setup)
        outputs = row_outputs(model, encoded, self, self.collator(setup), batch)
        for example, output in zip(examples, outputs, strict=True):
            yield self.answer(example, output, setup)

    def answer(self, example: Example, output: Tensor, setup: Setup) -> dict[str, Any]:
        """Return the prediction for a row, in words."""
        raise NotImplementedError


tasks: Registry[type[Task]] = Registry(
    "task", package="peftref.training.tasks", group="peftref.tasks"
)


def task_of(name: str) -> Task:
    """Return the task of that name.

    Raises:
        SpecError: there is none; the message gives the nearest name.
    """
    return tasks.get(name)()


def text_of(row: Mapping[str, Cell], name: str | None, place: Place) -> str:
    """Return the text of a cell; a list of words is joined by spaces.

    Raises:
        DataError: there is none.
    """
    value = None if name is None else row.get(name)
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value is None or isinstance(value, Mapping | bytes):
        raise DataError(
            f"{place.name}: no text in column {name!r}; columns: {', '.join(row) or 'none'}"
        )
    return str(value)


def class_number(value: Cell, names: Named, place: Place) -> int:
    """Return the number of a class.

    Raises:
        DataError: training never saw it.
    """
    key = label_key(value)
    if key not in names:
        raise DataError(
            f"{place.name}: label {key!r} does not occur in the training rows; known labels: "
            f"{', '.join(names)}"
        )
    return names[key]

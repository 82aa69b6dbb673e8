"""Any number of labels for a text or a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftref.errors import DataError
from peftref.training.columns import Columns
from peftref.training.encode import Collator, Row
from peftref.training.example import Example
from peftref.training.metrics import label_set_scores
from peftref.training.rows import Cell
from peftref.training.tasks.base import Named, Place, Setup, class_number, tasks
from peftref.training.tasks.texts import TextTask

__all__ = ["Multilabel"]


@tasks.register("multilabel")
class Multilabel(TextTask):
    """Any number of labels for a text; each is a yes or no of its own, yes from 0.5 on.

    The label column holds lists, or texts that ``data.separator`` cuts. A row without labels is
    a row like others.
    """

    name = "multilabel"
    head = "multilabel"
    metrics = ("micro_f1", "macro_f1", "subset_accuracy", "loss")
    may_be_empty = True

    def labels_in(self, cell: Cell, columns: Columns) -> tuple[Cell, ...]:
        """Return each label of a list or a separated text."""
        if isinstance(cell, list):
            return tuple(cell)
        if isinstance(cell, str) and columns.separator is not None:
            return tuple(part.strip() for part in cell.split(columns.separator) if part.strip())
        return () if cell in (None, "") else (cell,)

    def label(
        self, cell: Cell, columns: Columns, names: Named, place: Place
    ) -> tuple[int, ...]:
        """Return the class numbers, sorted."""
        if isinstance(cell, str) and cell and columns.separator is None:
            raise DataError(
                f"{place.name}: multilabel takes lists of labels, not the text {cell!r}; say with "
                "data.separator what separates the labels"
            )
        found = {class_number(each, names, place) for each in self.labels_in(cell, columns)}
        return tuple(sorted(found))

    def counted(self, example: Example) -> tuple[int, ...]:
        """Each label."""
        return example.label if isinstance(example.label, tuple) else ()

    def labels(self, example: Example, setup: Setup) -> dict[str, Any]:
        """Return a one for each label, (C,)."""
        if not isinstance(example.label, tuple):
            return {}
        return {"labels": [float(n in example.label) for n in range(len(setup.names))]}

    def collator(self, setup: Setup) -> Collator:
        """Labels are zeros and ones."""
        return Collator(setup.processor.pad_token_id, labels=torch.float32)

    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:  # noqa: ANN401
        """Scores, (B, C)."""
        return result.logits

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """F1 over all decisions and over labels, and the share of rows that are all right."""
        said = [(output > 0).tolist() for output in outputs]
        return {"loss": loss} | label_set_scores([row["labels"] for row in rows], said)

    def answer(self, example: Example, output: Tensor, setup: Setup) -> dict[str, Any]:
        """The labels, and the probability of each."""
        chances = dict(zip(setup.names, output.sigmoid().tolist(), strict=True))
        return {
            "labels": [name for name, chance in chances.items() if chance > 0.5],
            "probabilities": {name: round(chance, 6) for name, chance in chances.items()},
        }

"""One of several classes for a text or a pair."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from peftref.training.columns import Columns
from peftref.training.encode import Row
from peftref.training.example import Example
from peftref.training.metrics import class_scores
from peftref.training.rows import Cell
from peftref.training.tasks.base import Named, Place, Setup, class_number, tasks
from peftref.training.tasks.texts import TextTask

__all__ = ["Classification", "Classified"]


class Classified(TextTask):
    """What tasks have in common whose label is one class, whatever is shown."""

    metrics = ("accuracy", "macro_f1", "mcc", "loss")

    def labels_in(self, cell: Cell, columns: Columns) -> tuple[Cell, ...]:
        """A cell is a label."""
        return (cell,)

    def label(self, cell: Cell, columns: Columns, names: Named, place: Place) -> int:
        """Return the class number."""
        return class_number(cell, names, place)

    def stratum(self, example: Example) -> Hashable:
        """Every class occurs in every split."""
        return example.label

    def counted(self, example: Example) -> tuple[int, ...]:
        """One class."""
        return (example.label,) if isinstance(example.label, int) else ()

    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:  # noqa: ANN401
        """Class scores, (B, C)."""
        return result.logits

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """Accuracy, macro F1, Matthews' correlation."""
        said = [int(output.argmax()) for output in outputs]
        return {"loss": loss} | class_scores([row["labels"] for row in rows], said)

    def answer(self, example: Example, output: Tensor, setup: Setup) -> dict[str, Any]:
        """The likeliest class and its probability."""
        chances = output.softmax(-1)
        best = int(chances.argmax())
        return {"label": setup.names[best], "probability": round(float(chances[best]), 6)}


@tasks.register("classification")
class Classification(Classified):
    """One of several classes for a text or a pair."""

    name = "classification"
    head = "classification"

"""A quantity for a text or a pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftref.errors import DataError
from peftref.training.columns import Columns
from peftref.training.encode import Collator, Row
from peftref.training.example import Example
from peftref.training.metrics import correlations
from peftref.training.rows import Cell
from peftref.training.tasks.base import Named, Place, Setup, tasks
from peftref.training.tasks.texts import TextTask

__all__ = ["Regression", "quantity", "spread"]


def quantity(cell: Cell, place: Place) -> float:
    """Return the number in a cell.

    Raises:
        DataError: it is none.
    """
    try:
        number = float(cell)  # pyright: ignore[reportArgumentType]  # checked by the except
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{place.name}: a regression label must be a number, not {cell!r}")
    return number


def spread(examples: Sequence[Example]) -> list[str]:
    """Return least, greatest and mean quantity as a sentence."""
    values = [each.label for each in examples if isinstance(each.label, float)]
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    return [f"quantities in train: {min(values):g} to {max(values):g}, mean {mean:.4g}"]


@tasks.register("regression")
class Regression(TextTask):
    """A quantity for a text or a pair; the loss is the squared error."""

    name = "regression"
    head = "regression"
    metrics = ("spearman", "pearson", "loss")

    def label(self, cell: Cell, columns: Columns, names: Named, place: Place) -> float:
        """Return the quantity."""
        return quantity(cell, place)

    def describe(self, examples: Sequence[Example], names: Sequence[str]) -> list[str]:
        """Tell the range."""
        return spread(examples)

    def outputs(self, names: Sequence[str]) -> int | None:
        """One."""
        return None

    def collator(self, setup: Setup) -> Collator:
        """Labels are quantities."""
        return Collator(setup.processor.pad_token_id, labels=torch.float32)

    def row_outputs(self, result: Any, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:  # noqa: ANN401
        """Quantities, (B,)."""
        return result.logits.reshape(-1)

    def measure(
        self, rows: Sequence[Row], outputs: Sequence[Tensor], loss: float, setup: Setup
    ) -> dict[str, float]:
        """Pearson's and Spearman's correlation."""
        said = [float(output) for output in outputs]
        return {"loss": loss} | correlations([row["labels"] for row in rows], said)

    def answer(self, example: Example, output: Tensor, setup: Setup) -> dict[str, Any]:
        """The quantity."""
        return {"value": float(output)}

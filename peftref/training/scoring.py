"""Loss, metrics and outputs of a model on encoded rows; no randomness, no padding effects."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftref.training.encode import Collate, Encoded, batches_by_length

if TYPE_CHECKING:
    from peftref.training.tasks.base import Setup, Task

__all__ = ["evaluating", "row_outputs", "score_rows"]


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Switch dropout and gradients off; leave no random stream moved."""
    training = model.training
    model.eval()
    try:
        # A loader or a layer may draw numbers; scoring must not change what training draws next.
        devices = [device] if (device := next(model.parameters()).device).type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(training)


def score_rows(
    model: PreTrainedModel, encoded: Encoded, task: Task, setup: Setup, batch: int
) -> dict[str, float]:
    """Return loss and metrics of labelled rows.

    The loss is the mean over rows, or over scored tokens where each token has a label, whatever
    the batches are.
    """
    total, weight = 0.0, 0
    collate = task.collator(setup)
    outputs: dict[int, Tensor] = {}
    with evaluating(model):
        for numbers in batches_by_length(encoded.lengths, batch):
            inputs = {
                name: value.to(model.device)
                for name, value in collate([encoded.rows[number] for number in numbers]).items()
            }
            result = model(**inputs)
            scored = task.weight(inputs)
            if scored:
                total += float(result.loss) * scored
                weight += scored
            rows = task.row_outputs(result, inputs)
            if len(rows):
                outputs |= zip(numbers, [row.float().cpu() for row in rows], strict=True)
    ordered = [outputs[number] for number in range(len(encoded.rows))] if outputs else []
    return task.measure(encoded.rows, ordered, total / max(weight, 1), setup)


def row_outputs(
    model: PreTrainedModel, encoded: Encoded, task: Task, collate: Collate, batch: int
) -> list[Tensor]:
    """Return what the task reads of the model for each row, in order; labels are not looked at."""
    outputs: dict[int, Tensor] = {}
    with evaluating(model):
        for numbers in batches_by_length(encoded.lengths, batch):
            inputs = collate([encoded.rows[number] for number in numbers])
            inputs = {name: value.to(model.device) for name, value in inputs.items()
                      if name != "labels"}
            rows = task.row_outputs(model(**inputs), inputs)
            outputs |= zip(numbers, [row.float().cpu() for row in rows], strict=True)
    return [outputs[number] for number in range(len(encoded.rows))]

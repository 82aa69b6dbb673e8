"""Loss, metrics and scores of a model on encoded rows; no randomness, no padding effects."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftref.training.encode import IGNORED, Collator, Row, batches_by_length
from peftref.training.metrics import task_metrics

__all__ = ["class_scores", "score_rows"]


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
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
    model: PreTrainedModel, rows: Sequence[Row], collate: Collator, task: str, batch: int
) -> dict[str, float]:
    """Return loss and metrics of labelled rows.

    The loss is the mean over rows, or over scored tokens for a causal language model, whatever
    the batches are.
    """
    total, weight = 0.0, 0
    outputs: dict[int, Tensor] = {}
    with _evaluating(model):
        for numbers in batches_by_length([len(row["input_ids"]) for row in rows], batch):
            inputs = {
                name: value.to(model.device)
                for name, value in collate([rows[number] for number in numbers]).items()
            }
            result = model(**inputs)
            scored = len(numbers)
            if task == "causal_lm":
                # The first token of a row has nothing that predicts it.
                scored = int((inputs["labels"][:, 1:] != IGNORED).sum())
            if scored:
                total += float(result.loss) * scored
                weight += scored
            if task != "causal_lm":
                outputs |= dict(zip(numbers, result.logits.float().cpu(), strict=True))
    stacked = torch.stack([outputs[number] for number in range(len(rows))]) if outputs else None
    labels = [row["labels"] for row in rows] if stacked is not None else []
    return task_metrics(
        task, total / max(weight, 1), labels, None if stacked is None else stacked.numpy()
    )


def class_scores(
    model: PreTrainedModel, rows: Sequence[Row], collate: Collator, batch: int
) -> Tensor:
    """Return the head's output (N, C) for rows, in their order."""
    outputs: dict[int, Tensor] = {}
    with _evaluating(model):
        for numbers in batches_by_length([len(row["input_ids"]) for row in rows], batch):
            inputs = collate([rows[number] for number in numbers])
            inputs = {name: value.to(model.device) for name, value in inputs.items()
                      if name != "labels"}
            outputs |= dict(zip(numbers, model(**inputs).logits.float().cpu(), strict=True))
    return torch.stack([outputs[number] for number in range(len(rows))])

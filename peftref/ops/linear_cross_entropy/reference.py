"""Cross-entropy of a linear layer's logits, the logits formed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy over the labels that are not ignored.

    Args:
        hidden: (..., d).
        weight: (classes, d).
        bias: (classes,), or None.
        labels: (...), class numbers or ``ignore_index``.
        ignore_index: label of positions that do not count.
        label_smoothing: share of the target spread over all classes.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )

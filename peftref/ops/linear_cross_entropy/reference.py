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
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean: bool = True,
    *_: object,
) -> Tensor:
    """Return the cross-entropy, summed or the mean over the labels that are not ignored.

    Args:
        hidden: (rows, d).
        weight: (classes, d).
        bias: (classes,), or None.
        labels: (rows,), class numbers or ``ignore_index``.
        ignore_index: label of rows that do not count.
        label_smoothing: share of the target spread over all classes.
        mean: or the sum.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="mean" if mean else "sum",
    )

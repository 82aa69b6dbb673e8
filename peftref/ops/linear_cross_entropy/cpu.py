"""Cross-entropy of a linear layer in chunks of rows, gradients included.

A chunk's logits become the gradient of the loss in place and are spent on the gradients of the
layer at once, so that at no time more than one chunk of logits exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.sums import wide

__all__ = ["Softmax", "backward", "chunked", "forward"]

_ENTRIES = 1 << 22  # of logits in a chunk: enough rows for a product at full speed
_FEWEST = 64

Softmax = Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]
"""``(logits, labels, weights of rows, smoothing, turn them into the gradient) -> losses``."""


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The loss, and its gradients by hidden, weight and bias; empty where not wanted."""
    entries = _ENTRIES * 2 if wanted[1] else _ENTRIES
    return chunked(
        (hidden, weight, bias), labels, (ignore_index, label_smoothing, mean), wanted,
        (max(_FEWEST, entries // weight.shape[0]), _softmax),
    )  # fmt: skip


def backward(gradient: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """The gradients of the loss, times that of what followed it."""
    return [part * gradient.to(part.dtype) for part in parts]


def chunked(
    layer: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    options: tuple[int, float, bool],
    wanted: list[bool],
    form: tuple[int, Softmax],
) -> list[Tensor]:
    """``forward`` with ``form``: rows in a chunk, and what makes a gradient of logits."""
    hidden, weight, bias = layer
    ignore_index, smoothing, mean = options
    size, softmax = form
    dtype = wide(hidden)
    counts = labels != ignore_index
    number = counts.sum().to(dtype) if mean else torch.ones((), dtype=dtype, device=hidden.device)
    weights = torch.where(counts, 1 / number, 0)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    d_weight = weight.new_zeros(weight.shape if wanted[1] else 0, dtype=dtype)
    d_bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=dtype)
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logits = torch.nn.functional.linear(hidden[rows], weight, bias)
        loss += softmax(logits, labels[rows], weights[rows], smoothing, any(wanted)).sum()
        if wanted[0]:
            torch.mm(logits, weight, out=d_hidden[rows])
        if wanted[1] and dtype == hidden.dtype:
            d_weight.addmm_(logits.t(), hidden[rows])
        elif wanted[1]:
            d_weight += logits.t() @ hidden[rows]
        if wanted[2]:
            d_bias += logits.sum(0, dtype=dtype)
    # A mean of nothing is not a number; its gradient is none.
    loss = loss if not mean else torch.where(number > 0, loss, torch.nan)
    return [loss, d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)]


def _softmax(
    logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float, gradient: bool
) -> Tensor:
    z = logits if logits.dtype == weights.dtype else logits.to(weights.dtype)
    classes = z.shape[1]
    target = torch.where(weights > 0, labels, 0)[:, None]
    chosen = z.gather(1, target)[:, 0] * (1 - smoothing)
    if smoothing:
        chosen += z.sum(1) * (smoothing / classes)
    largest = z.amax(1)
    z.sub_(largest[:, None]).exp_()
    total = z.sum(1)
    losses = (largest + total.log() - chosen) * weights
    if gradient:
        z.mul_((weights / total)[:, None])
        if smoothing:
            z.sub_((weights * (smoothing / classes))[:, None])
        z.scatter_add_(1, target, ((smoothing - 1) * weights)[:, None])
        if z is not logits:
            logits.copy_(z)
    return torch.where(weights > 0, losses, 0)

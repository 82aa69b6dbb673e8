"""Cross-entropy of a linear layer on a GPU: a chunk's logits are read twice and written once."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftref.ops.linear_cross_entropy import cpu
from peftref.ops.tiles import HALVES, Variant, pointers

__all__ = ["backward", "forward", "variants"]

_COLUMNS = 4096
_ENTRIES = 1 << 26  # of logits in a chunk: 128 MiB in 16 bits
_FEWEST = 256


@triton.jit
def _softmax(
    p_logits, p_labels, p_weights, p_losses, n_columns, smoothing,
    GRADIENT: tl.constexpr, BC: tl.constexpr,
):
    """The loss of a row, and in place its gradient by the logits."""
    i_row = tl.program_id(0)
    i = tl.arange(0, BC)
    weight = tl.load(p_weights + i_row)
    label = tl.load(p_labels + i_row)
    p_logits += i_row.to(tl.int64) * n_columns
    largest = tl.full((BC,), -float("inf"), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    plain = tl.zeros((BC,), tl.float32)
    chosen = tl.zeros((BC,), tl.float32)
    for start in range(0, n_columns, BC):
        held = start + i < n_columns
        b = tl.load(p_logits + start + i, mask=held, other=-float("inf")).to(tl.float32)
        # The first pass keeps a maximum and a sum in each place, and joins them at the end.
        now = tl.maximum(largest, b)
        low = tl.where(now == -float("inf"), 0.0, now)
        total = total * tl.exp(largest - low) + tl.exp(b - low)
        largest = now
        plain += tl.where(held, b, 0.0)
        chosen += tl.where(start + i == label, b, 0.0)
    top = tl.max(largest, 0)
    sum_of_all = tl.sum(total * tl.exp(largest - top), 0)
    aim = (1 - smoothing) * tl.sum(chosen, 0) + smoothing / n_columns * tl.sum(plain, 0)
    loss = (top + tl.log(sum_of_all) - aim) * weight
    tl.store(p_losses + i_row, tl.where(weight > 0, loss, 0.0))
    if GRADIENT:
        for start in range(0, n_columns, BC):
            held = start + i < n_columns
            b = tl.load(p_logits + start + i, mask=held, other=-float("inf")).to(tl.float32)
            d = tl.exp(b - top) / sum_of_all - smoothing / n_columns
            d = (d - tl.where(start + i == label, 1 - smoothing, 0.0)) * weight
            d = tl.where(weight > 0, d, 0.0)
            tl.store(p_logits + start + i, d.to(p_logits.dtype.element_ty), mask=held)


def _launch(
    logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float, gradient: bool
) -> Tensor:
    losses = torch.empty_like(weights)
    _softmax[logits.shape[0],](
        logits, labels, weights, losses, logits.shape[1], smoothing,
        GRADIENT=gradient, BC=_COLUMNS, num_warps=8,
    )
    return losses


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
    options = (ignore_index, label_smoothing, mean)
    if hidden.dtype == torch.float64:
        return cpu.forward(hidden, weight, bias, labels, *options, wanted)
    size = max(_FEWEST, _ENTRIES // weight.shape[0])
    return cpu.chunked((hidden, weight, bias), labels, options, wanted, (size, _launch))


backward = cpu.backward


def variants() -> Iterator[Variant]:
    """With and without a gradient, in 16 bits."""
    for dtype in HALVES:
        signature = pointers(dtype, "p_logits") | pointers("fp32", "p_weights", "p_losses")
        signature |= {"p_labels": "*i64", "n_columns": "i32", "smoothing": "fp32"}
        for gradient in (True, False):
            yield Variant(
                f"linear_cross_entropy {dtype} gradient={gradient}",
                _softmax,
                signature,
                {"GRADIENT": gradient, "BC": _COLUMNS},
                num_warps=8,
                unaligned=("n_columns",),
            )

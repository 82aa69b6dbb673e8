"""A linear map with a low-rank addition and a scale of each output.

What makes it fast on a CPU: the scale goes into the weight, where that is small beside the stream
and in 32 bits at least (in 16 a ratio near 1 would be rounded away); the low-rank part is added in
place; the gradient of the scale is read off the output, which what follows mostly keeps anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftref.ops.scale_shift.cpu import scaled
from peftref.ops.sums import column_dot, wide

__all__ = ["SMALL", "backward", "forward", "low_rank_backward", "ratio_gradient", "rescue"]

SMALL = 0.1
"""A ratio below which the unscaled output is computed anew and not divided out."""


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ratio: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output, and ``x A^T`` (rows, r) for the backward pass."""
    flat = x.reshape(-1, x.shape[-1])
    hidden = flat @ down.to(x.dtype).t()
    if _folds(flat, weight, ratio):
        y = linear(flat, weight * ratio[:, None], bias)
        y.addmm_(hidden, (up * (scale * ratio)[:, None]).t())
    else:
        y = flat @ weight.t()
        y.addmm_(hidden, (up * scale).to(x.dtype).t())
        scaled(y, ratio, bias, y)
    return y.view(*x.shape[:-1], y.shape[-1]), hidden


def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ratio: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of x, bias, down, up and ratio; empty where ``wanted`` says no."""
    flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dtype = wide(dy, ratio)
    sums = d_ratio = dy.new_empty(0, dtype=dtype)
    if wanted[1] or y is not None:
        sums = dy.sum(0, dtype=dtype)
    if y is not None:
        dots = column_dot(dy, y.reshape(dy.shape), dtype)
        d_ratio = ratio_gradient(dots, sums, bias, ratio)
        rescue(d_ratio, dy, (flat, hidden), (weight, up * scale), ratio)
    if _folds(flat, weight, ratio):
        weight, factor = weight * ratio[:, None], scale * ratio
    else:
        dy, factor = scaled(dy, ratio, None, torch.empty_like(dy)), scale.to(ratio).expand_as(ratio)
    d_x, d_down, d_up = low_rank_backward(dy, flat, hidden, weight, (down, up), factor, wanted)
    d_bias = sums if wanted[1] else dy.new_empty(0, dtype=dtype)
    d_ratio = d_ratio if y is not None else d_bias.new_empty(0)
    return [d_x.view(x.shape) if wanted[0] else d_x, d_bias, d_down, d_up, d_ratio]


def low_rank_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    factors: tuple[Tensor, Tensor],
    factor: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, A and B of ``x W^T + (x A^T) (f B)^T``, in their types."""
    down, up = factors
    d_x, d_down, d_up = dy.new_empty(0), down.new_empty(0), up.new_empty(0)
    if wanted[3]:
        # (S^T dY)^T: up to twice as fast as dY^T S, whose result has short rows.
        d_up = (hidden.t() @ dy).t().to(up.dtype, memory_format=torch.contiguous_format)
        d_up = d_up.mul_(factor[:, None])
    d_hidden = dy @ (up * factor[:, None]).to(dy.dtype)
    if wanted[0]:
        d_x = dy @ weight
        d_x.addmm_(d_hidden, down.to(dy.dtype))
    if wanted[2]:
        d_down = (d_hidden.t() @ x).to(down.dtype)
    return d_x, d_down, d_up


def ratio_gradient(dots: Tensor, sums: Tensor, bias: Tensor | None, ratio: Tensor) -> Tensor:
    """``sum_t dy_t (y_t - b) / c`` from ``sum_t dy_t y_t`` and ``sum_t dy_t``."""
    return (dots if bias is None else dots - bias * sums) / ratio


def rescue(
    d_ratio: Tensor,
    dy: Tensor,
    reads: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    ratio: Tensor,
) -> None:
    """Outputs whose scale is near zero do not tell what was scaled."""
    small = (ratio.abs() < SMALL).nonzero()[:, 0]
    if not small.numel():
        return
    (x, hidden), (weight, up) = reads, weights
    y = x @ weight[small].t()
    y.addmm_(hidden, up[small].to(x.dtype).t())
    d_ratio[small] = column_dot(dy[:, small], y, d_ratio.dtype)


def _folds(x: Tensor, weight: Tensor, ratio: Tensor) -> bool:
    return x.dtype == wide(weight, ratio) == weight.dtype and x.shape[0] > x.shape[1] // 2

"""Several low-rank updates added into one frozen product in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, then ``A x`` (N, rows, rank)."""
    rows = _rows(x)
    hidden = torch.bmm(rows, _chosen(down, index, x).mT)
    y = linear(x, weight, bias)
    scaled = hidden * _chosen(scale, index, x)[:, None, None]
    y.view(*rows.shape[:2], -1).baddbmm_(scaled, _chosen(up, index, x).mT)
    return y, hidden


def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, bias, down, up and scale; empty where ``wanted`` says no."""
    d_x, d_bias, d_down, d_up, d_scale = (hidden.new_empty(0) for _ in range(5))
    of_y = _rows(dy)
    factor = _chosen(scale, index, dy)[:, None, None]
    if wanted[1]:
        d_bias = of_y.sum((0, 1))
    if wanted[3]:
        # (S^T dY)^T: faster than dY^T S, whose result has short rows.
        each = torch.bmm((hidden * factor).mT, of_y).mT
        d_up = _gathered(each, up, index)
    d_hidden = torch.bmm(of_y, _chosen(up, index, dy))
    if wanted[4]:
        wide = torch.promote_types(dy.dtype, torch.float32)
        d_scale = _gathered((d_hidden.to(wide) * hidden).sum((1, 2)), scale, index)
    d_hidden *= factor
    if wanted[2]:
        d_down = _gathered(torch.bmm(d_hidden.mT, _rows(x)), down, index)
    if wanted[0]:
        d_x = dy @ weight
        d_x.view(*of_y.shape[:2], -1).baddbmm_(d_hidden, _chosen(down, index, dy))
    return d_x, d_bias, d_down, d_up, d_scale


def _rows(x: Tensor) -> Tensor:
    """``x`` as (N, rows, d)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _chosen(tensor: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    tensor = tensor.to(like.dtype)
    return tensor if index is None else tensor.index_select(0, index)


def _gathered(each: Tensor, parameter: Tensor, index: Tensor | None) -> Tensor:
    """Gradients of the samples, summed over those that share an adapter."""
    each = each.to(parameter.dtype)
    if index is None:
        return each.contiguous()
    return torch.zeros_like(parameter).index_add_(0, index, each)

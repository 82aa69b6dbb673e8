"""Products that touch the trained places only, where these have a structure.

Entries anywhere have none: their gradient is a gather from the whole product ``dY^T x``, which no
index set of use is cheaper than. The weight that entries make is formed again in the backward pass,
so that nothing of a weight's size is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftref.ops.masked_delta_linear.reference import difference

__all__ = ["backward", "forward"]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, structure: str
) -> Tensor:
    """The output."""
    rows = x.reshape(-1, x.shape[-1])
    narrow = values.to(x.dtype)
    if structure == "entries":
        formed = _formed(weight, values, index)
        if formed is not None:
            return linear(x, formed, bias)
        y = linear(rows, weight, bias)
        y.addmm_(rows, _difference(weight, narrow, index).t())
        return y.view(*x.shape[:-1], -1)
    y = linear(rows, weight, bias)
    if structure == "rows":
        y.index_add_(1, index, rows @ narrow.t())
    elif structure == "columns":
        y.addmm_(rows.index_select(1, index), narrow.t())
    else:
        size = values.shape[-1]
        update = torch.bmm(_gathered(rows, index[:, 1], size), narrow.mT)
        _blocks(y, size).index_add_(1, index[:, 0], update.transpose(0, 1))
    return y.view(*x.shape[:-1], -1)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    structure: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, bias and values; empty where ``wanted`` says no."""
    d_x, d_bias, d_values = (dy.new_empty(0) for _ in range(3))
    flat = dy.reshape(-1, dy.shape[-1])
    if wanted[0]:
        d_x = _through_input(flat, weight, values, index, structure)
        d_x = d_x.view(*dy.shape[:-1], weight.shape[1])
    if wanted[1]:
        d_bias = flat.sum(0)
    if wanted[2] and x is not None:
        rows = x.reshape(flat.shape[0], -1)
        d_values = _through_values(flat, rows, values, index, structure).to(values.dtype)
    return d_x, d_bias, d_values


def _through_input(
    dy: Tensor, weight: Tensor, values: Tensor, index: Tensor, structure: str
) -> Tensor:
    narrow = values.to(dy.dtype)
    if structure == "entries":
        formed = _formed(weight, values, index)
        if formed is not None:
            return dy @ formed
        return (dy @ weight).addmm_(dy, _difference(weight, narrow, index))
    d_x = dy @ weight
    if structure == "rows":
        d_x.addmm_(dy.index_select(1, index), narrow)
    elif structure == "columns":
        d_x.index_add_(1, index, dy @ narrow)
    else:
        size = values.shape[-1]
        update = torch.bmm(_gathered(dy, index[:, 0], size), narrow)
        _blocks(d_x, size).index_add_(1, index[:, 1], update.transpose(0, 1))
    return d_x


def _through_values(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, structure: str
) -> Tensor:
    if structure == "entries":
        return (dy.t() @ x).view(-1).index_select(0, index)
    if structure == "rows":
        return dy.index_select(1, index).t() @ x
    if structure == "columns":
        return dy.t() @ x.index_select(1, index)
    size = values.shape[-1]
    of_output = _gathered(dy, index[:, 0], size)
    return torch.bmm(of_output.mT, _gathered(x, index[:, 1], size))


def _formed(weight: Tensor, values: Tensor, index: Tensor) -> Tensor | None:
    """``W + D``; None in 16 bits, where a small difference would be rounded away."""
    if weight.dtype.itemsize < 4:
        return None
    formed = weight.clone(memory_format=torch.contiguous_format)
    formed.view(-1).index_add_(0, index, values.to(weight.dtype))
    return formed


def _difference(weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return difference(values, index, (weight.shape[0], weight.shape[1]), "entries")


def _blocks(tensor: Tensor, size: int) -> Tensor:
    """A view (rows, blocks, size)."""
    return tensor.view(tensor.shape[0], -1, size)


def _gathered(tensor: Tensor, index: Tensor, size: int) -> Tensor:
    """Blocks of columns (n, rows, size)."""
    return _blocks(tensor, size).index_select(1, index).transpose(0, 1)

"""A linear map of a block-rotated input.

Where the stream has more rows than the weight, and in 32 bits, the weight is rotated and not the
stream: ``y = x (W R^T)^T``, and ``(W R^T)^T = R W^T`` block by block comes out in one piece. Then
``dx = dy (W R^T)`` needs no rotation either, and as ``R`` is orthogonal ``dR = (x^T dx) R``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftref.ops.block_rotate.cpu import crossed, rotated
from peftref.ops.sums import wide

__all__ = ["backward", "forward"]


def forward(x: Tensor, rotation: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(x blockdiag(R)) W^T + b``."""
    flat = x.reshape(-1, x.shape[-1])
    if _folds(flat, weight, rotation):
        thin = _folded(rotation, weight)
    else:
        flat, thin = rotated(flat, rotation.to(x.dtype)), weight.t()
    y = flat @ thin if bias is None else torch.addmm(bias.to(x.dtype), flat, thin)
    return y.view(*x.shape[:-1], y.shape[-1])


def backward(
    dy: Tensor, x: Tensor, rotation: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of the input and the blocks; empty if not wanted."""
    flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    block = rotation.shape[-1]
    none = rotation.new_empty(0)
    if _folds(flat, weight, rotation):
        d_x = dy @ _folded(rotation, weight).t()
        d_rotation = crossed(flat, d_x, block) @ rotation if wanted[1] else none
        return d_x.view(x.shape) if wanted[0] else dy.new_empty(0), d_rotation
    d_rotated = dy @ weight
    d_rotation = crossed(flat, d_rotated, block).to(rotation.dtype) if wanted[1] else none
    if not wanted[0]:
        return dy.new_empty(0), d_rotation
    return rotated(d_rotated, rotation.to(dy.dtype).mT).view(x.shape), d_rotation


def _folded(rotation: Tensor, weight: Tensor) -> Tensor:
    """``blockdiag(R) W^T`` (d_in, d_out)."""
    parts = weight.t().unflatten(0, rotation.shape[:2])
    return torch.bmm(rotation, parts).flatten(0, 1)


def _folds(x: Tensor, weight: Tensor, rotation: Tensor) -> bool:
    return x.dtype == wide(weight, rotation) == weight.dtype and x.shape[0] >= weight.shape[0] // 2

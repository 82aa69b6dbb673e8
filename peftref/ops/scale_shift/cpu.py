"""Elementwise scale and shift: the sums of the gradient form no product of the stream's size."""

from __future__ import annotations

import torch
from torch import Tensor

from peftref.ops.sums import column_dot, row_blocks, wide

__all__ = ["backward", "forward", "scaled"]


def forward(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """``x * scale + shift``."""
    return scaled(x, scale, shift, torch.empty_like(x, memory_format=torch.contiguous_format))


def scaled(x: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor) -> Tensor:
    """``x * scale + shift``, written to ``out``, which may be ``x``."""
    flat, into = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    if scale.dtype == x.dtype and (shift is None or shift.dtype == x.dtype):
        if shift is None:
            torch.mul(flat, scale, out=into)
        else:
            torch.addcmul(shift, flat, scale, out=into)
        return out
    dtype = wide(x, scale)
    for rows in row_blocks(flat):
        block = flat[rows] * scale.to(dtype)
        into[rows] = block if shift is None else block.add_(shift)
    return out


def backward(
    dy: Tensor, x: Tensor, scale: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx = dy * scale``, ``dscale = sum(dy * x)``, ``dshift = sum(dy)``; empty if not needed.

    The sums are in float32 or wider.
    """
    flat, dtype = dy.reshape(-1, dy.shape[-1]), wide(dy, scale)
    dx = scaled(dy, scale, None, torch.empty_like(x)) if needs[0] else dy.new_empty(0)
    none = dy.new_empty(0, dtype=dtype)
    dscale = column_dot(flat, x.reshape(flat.shape), dtype) if needs[1] else none
    return dx, dscale, flat.sum(0, dtype=dtype) if needs[2] else none.clone()

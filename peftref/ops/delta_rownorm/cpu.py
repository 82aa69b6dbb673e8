"""Row norms of ``W + s B A`` by ``||W||^2 + 2 s (W A^T) B + s^2 (B A A^T) B``, summed over r.

One product with ``W``, thin on one side, instead of a weight formed anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftref.ops.sums import row_blocks, wide

__all__ = ["backward", "forward", "gram"]


def forward(
    weight: Tensor, down: Tensor, up: Tensor, scale: Tensor, squares: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norms, and ``W A^T`` (d_out, r) for the backward pass; float32 or wider."""
    dtype = wide(weight, down, up)
    crossed = weight.new_empty(weight.shape[0], down.shape[0], dtype=dtype)
    total = weight.new_empty(weight.shape[0], dtype=dtype) if squares is None else squares.clone()
    for rows in row_blocks(weight) if squares is None or weight.dtype != dtype else [slice(None)]:
        block = weight[rows].to(dtype)
        torch.mm(block, down.to(dtype).t(), out=crossed[rows])
        if squares is None:
            total[rows] = torch.linalg.vecdot(block, block)
    wide_up = up.to(dtype) * scale
    low = torch.addmm(crossed, wide_up, gram(down, dtype), beta=2)
    # Exact sums are not negative; rounded ones of a weight that is nearly cancelled can be.
    return total.add_(torch.linalg.vecdot(low, wide_up)).clamp_(min=0).sqrt_(), crossed


def backward(
    gradient: Tensor,
    norm: Tensor,
    crossed: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``A`` and ``B``, wide: ``d||w|| = w dw / ||w||``."""
    dtype = norm.dtype
    share = torch.where(norm > 0, gradient / norm, 0)[:, None] * scale
    wide_up = up.to(dtype) * scale
    d_up = share * torch.addmm(crossed, wide_up, gram(down, dtype))
    weighted = share * up.to(dtype)
    d_down = (weighted.t() @ wide_up) @ down.to(dtype)
    for rows in row_blocks(weight) if weight.dtype != dtype else [slice(None)]:
        d_down.addmm_(weighted[rows].t(), weight[rows].to(dtype))
    return d_down, d_up


def gram(down: Tensor, dtype: torch.dtype) -> Tensor:
    """``A A^T`` (r, r)."""
    return down.to(dtype) @ down.to(dtype).t()

"""Dropout from a seed, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from peftref.ops.seed import blocks

__all__ = ["forward"]


def forward(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``keep * x / (1 - p)``; the gradient is the same map."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for start, stop, mask, _ in blocks(seed, *flat.shape, p=p, dtype=x.dtype):
        torch.mul(flat[start:stop], mask.mul_(1 / (1 - p)), out=y[start:stop])
    return y.view(x.shape)

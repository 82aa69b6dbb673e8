"""A linear map of a block-rotated input, in its two steps."""

from __future__ import annotations

import torch
from torch import Tensor

from peftref.ops.block_rotate.reference import block_rotate

__all__ = ["rotated_linear"]


def rotated_linear(x: Tensor, rotation: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``y = (x blockdiag(R_1, ..., R_n)) W^T + b``.

    Args:
        x: (..., n * b).
        rotation: the blocks (n, b, b), each orthogonal, in the type of ``x`` or a wider one.
        weight: ``W`` (d_out, n * b), frozen.
        bias: ``b`` (d_out,), frozen, or None.
    """
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(block_rotate(x, rotation), weight, bias)

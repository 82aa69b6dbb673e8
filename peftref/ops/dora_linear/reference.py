"""A linear map whose weight has direction and magnitude apart, factored."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dora_linear"]


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ratio: Tensor,
) -> Tensor:
    """Return ``y = (x W^T + s (x A^T) B^T) * c + b`` with ``c = m / ||W + s B A||``.

    DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353; the norm is a constant (section 4.3).

    Args:
        x: (..., d_in).
        weight: ``W`` (d_out, d_in), frozen.
        bias: ``b`` (d_out,), frozen, or None.
        down: ``A`` (r, d_in).
        up: ``B`` (d_out, r).
        scale: ``s``, of one element; a constant.
        ratio: ``c`` (d_out,).
    """
    linear = torch.nn.functional.linear
    y = (linear(x, weight) + scale.to(x.dtype) * linear(linear(x, down), up)) * ratio
    return y if bias is None else y + bias

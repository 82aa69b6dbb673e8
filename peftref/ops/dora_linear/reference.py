"""A linear map whose weight has direction and magnitude apart, factored."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from peftref.ops.sums import wide

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
    """Return ``y = (x W^T + s (x A^T) B^T) * c + b``; DoRA has ``c = m / ||W + s B A||``.

    DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353; the norm is a constant (section 4.3).

    Args:
        x: (..., d_in).
        weight: ``W`` (d_out, d_in), frozen.
        bias: ``b`` (d_out,), or None.
        down: ``A`` (r, d_in), in the type of ``x`` or a wider one; so are ``up`` and ``ratio``.
        up: ``B`` (d_out, r).
        scale: ``s`` (), a constant.
        ratio: ``c`` (d_out,).
    """
    low = linear(linear(x, down.to(x.dtype)), up.to(x.dtype)) * scale.to(x.dtype)
    y = (linear(x, weight) + low).to(wide(x, ratio)) * ratio
    return (y if bias is None else y + bias).to(x.dtype)

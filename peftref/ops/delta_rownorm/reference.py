"""Row norms of a weight with a low-rank addition, the sum formed."""

from __future__ import annotations

from torch import Tensor

from peftref.ops.sums import wide

__all__ = ["delta_rownorm"]


def delta_rownorm(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    squares: Tensor | None = None,  # noqa: ARG001 - as the kernels
) -> Tensor:
    """Return ``||W + s B A||`` of every row (d_out,), in float32 or wider.

    Args:
        weight: ``W`` (d_out, d_in), frozen.
        down: ``A`` (r, d_in).
        up: ``B`` (d_out, r).
        scale: ``s`` (), a constant.
        squares: ``||W||^2`` (d_out,) if it is known; the definition has no use for it.
    """
    dtype = wide(weight, down, up)
    delta = scale.to(dtype) * (up.to(dtype) @ down.to(dtype))
    return (weight.to(dtype) + delta).norm(dim=1)

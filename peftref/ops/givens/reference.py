"""A tree of 2x2 maps on pairs of coordinates, round by round."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["givens", "planes_of_angles"]


def planes_of_angles(angles: Tensor) -> Tensor:
    """Return the 2x2 rotations (..., 2, 2) by ``angles`` (...); ``(a, b) -> (a, b) P``."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))


def givens(x: Tensor, planes: Tensor) -> Tensor:
    """Return ``y = x P_1 ... P_L``, round ``P_r`` on the pairs ``(i, i + 2^(r-1))``.

    ``i`` runs over the multiples of ``2^r``, so that every coordinate ``j >= 1`` is the second of
    exactly one pair, in the round of its lowest set bit: ``d - 1`` planes for any ``d``, and
    planes[j - 1] is the one of ``j``. A coordinate without a partner passes. Rotations make ``y``
    an orthogonal map of ``x``; free 2x2 matrices any such product.
    GOFT and qGOFT, Ma et al. 2024, https://arxiv.org/abs/2404.04316

    Args:
        x: (..., d).
        planes: (d - 1, 2, 2), applied to the row vector ``(x_i, x_j)``, in the type of ``x`` or a
            wider one.
    """
    width = x.shape[-1]
    step = 1
    while step < width:
        second = torch.arange(step, width, 2 * step, device=x.device)
        plane = planes[second - 1].to(x.dtype)
        pairs = torch.stack([x[..., second - step], x[..., second]], -1)
        pairs = torch.einsum("...np,npq->...nq", pairs, plane)
        x = x.index_copy(-1, second - step, pairs[..., 0]).index_copy(-1, second, pairs[..., 1])
        step *= 2
    return x

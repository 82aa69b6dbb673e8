"""A chain of reflections, one after another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["householder"]


def householder(x: Tensor, vectors: Tensor) -> Tensor:
    """Return ``y = x H_1 ... H_r`` with ``H_i = I - 2 u_i u_i^T / (u_i . u_i)``.

    HRA, Yuan et al. 2024, https://arxiv.org/abs/2405.17484

    Args:
        x: (..., d).
        vectors: the ``u_i`` (r, d), none of them zero.
    """
    for u in torch.nn.functional.normalize(vectors, dim=-1):
        x = x - 2 * (x @ u)[..., None] * u
    return x

"""A block-diagonal map of the last axis, written as it is defined."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_rotate"]


def block_rotate(x: Tensor, rotation: Tensor, recover: bool = False) -> Tensor:  # noqa: ARG001 - as the kernels
    """Return ``y = x blockdiag(R_1, ..., R_n)``.

    OFT, Qiu et al. 2023, https://arxiv.org/abs/2306.07280

    Args:
        x: (..., n * b).
        rotation: the blocks (n, b, b), in the type of ``x`` or a wider one.
        recover: what the backward pass keeps; the definition has no use for it.
    """
    parts = x.unflatten(-1, (rotation.shape[0], rotation.shape[1]))
    return torch.einsum("...nb,nbc->...nc", parts, rotation.to(x.dtype)).flatten(-2)

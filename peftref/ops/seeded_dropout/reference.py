"""The definition of dropout from a seed."""

from __future__ import annotations

from torch import Tensor

from peftref.ops.seed import keep

__all__ = ["seeded_dropout"]


def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``keep * x / (1 - p)``.

    Args:
        x: (..., d).
        p: the share of entries set to zero.
        seed: (2,) int32.
    """
    mask = keep(seed, x.numel() // x.shape[-1], x.shape[-1], p)
    return x * mask.view(x.shape).to(x.dtype) * (1 / (1 - p))

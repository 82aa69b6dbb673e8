"""Elementwise scale and shift of the last axis, written as it is defined."""

from __future__ import annotations

from torch import Tensor

__all__ = ["scale_shift"]


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return ``y = x * scale + shift``.

    Args:
        x: (..., d).
        scale: (d,).
        shift: (d,), or None for none.
    """
    y = x * scale
    return y if shift is None else y + shift

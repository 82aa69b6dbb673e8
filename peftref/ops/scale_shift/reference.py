"""Elementwise scale and shift of the last axis, written as it is defined."""

from __future__ import annotations

from torch import Tensor

__all__ = ["scale_shift"]


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return ``y = x * scale + shift`` in the type of ``x``.

    Args:
        x: (..., d).
        scale: (d,), may be wider than ``x``.
        shift: (d,), or None for none.
    """
    y = x * scale
    return (y if shift is None else y + shift).to(x.dtype)

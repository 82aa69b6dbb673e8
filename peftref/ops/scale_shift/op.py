"""Elementwise scale and shift of the last axis, their gradients in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.scale_shift import cpu, reference
from peftref.ops.sums import wide

__all__ = ["OPERATOR", "scale_shift"]


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """``x * scale + shift`` in the type of ``x``; only ``x`` and ``scale`` are kept.

    Args:
        x: (..., d).
        scale: (d,), may be wider than ``x``; so may be ``shift``.
        shift: (d,), or None for none.
    """
    return OPERATOR(x, scale, shift)


def _fake_forward(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    dy: Tensor, x: Tensor, scale: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(dy, scale)
    sums = [dy.new_empty(scale.shape if need else 0, dtype=dtype) for need in needs[1:]]
    return torch.empty_like(x) if needs[0] else dy.new_empty(0), sums[0], sums[1]


def _save(arguments: tuple[Tensor, Tensor, Tensor | None], y: Tensor) -> Saved:
    x, scale, shift = arguments
    return Saved((x, scale), (None if shift is None else shift.dtype,))


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> list[Tensor | None]:
    x, scale = saved.tensors
    (shift_type,) = saved.constants
    found = backward(gradients[0].contiguous(), x.contiguous(), scale, list(needs))
    types = (x.dtype, scale.dtype, shift_type)
    return [
        g.to(t) if need and isinstance(t, torch.dtype) else None
        for g, t, need in zip(found, types, needs, strict=True)
    ]


OPERATOR: Operator[Tensor] = Operator(
    "scale_shift",
    reference=reference.scale_shift,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake_forward, _fake_backward),
    rule=Rule(_save, _gradients),
)

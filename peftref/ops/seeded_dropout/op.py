"""Dropout that keeps no mask for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.seed import draw_seed
from peftref.ops.seeded_dropout import cpu, reference

__all__ = ["OPERATOR", "seeded_dropout"]


def seeded_dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """``keep * x / (1 - p)``, where ``keep`` is drawn again from its seed in the backward pass.

    Args:
        x: (..., d).
        p: the share of entries set to zero, counted in steps of 2^-16; 0 returns ``x`` itself.
        seed: (2,) int32; drawn from torch's generator when not given.
    """
    if p == 0:
        return x
    return OPERATOR(x, p, draw_seed(x) if seed is None else seed)


def _fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(arguments: tuple[Tensor, float, Tensor], y: Tensor) -> Saved:
    _, p, seed = arguments
    return Saved((seed,), (p,))


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., Tensor],
) -> tuple[Tensor, None, None]:
    return backward(gradients[0], *saved.constants, *saved.tensors), None, None


OPERATOR: Operator[Tensor] = Operator(
    "seeded_dropout",
    reference=reference.seeded_dropout,
    kernels=Kernels(cpu.forward, cpu.forward),
    fake=Kernels(_fake, _fake),
    rule=Rule(_save, _gradients),
)

"""A tree of 2x2 maps on pairs of coordinates, all rounds as one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.givens import cpu, reference
from peftref.ops.givens.reference import planes_of_angles
from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.precision import autocast

__all__ = ["OPERATOR", "givens", "planes_of_angles"]


def givens(x: Tensor, planes: Tensor) -> Tensor:
    """``x P_1 ... P_L``, round ``P_r`` on the pairs ``(i, i + 2^(r-1))``; see the definition.

    The rounds are multiplied into small matrices first, hence the planes may be any 2x2 matrices
    (qGOFT) and nothing has to be inverted. The backward pass keeps ``x`` and the planes.

    Args:
        x: (..., d), d at least 2.
        planes: (d - 1, 2, 2), applied to the row vector ``(x_i, x_j)``, ordered by ``j``;
            ``planes_of_angles`` makes rotations.
    """
    x, _ = autocast(x)
    return OPERATOR(x, planes)


def _fake_forward(x: Tensor, planes: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    dy: Tensor, x: Tensor, planes: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(dy) if wanted[0] else dy.new_empty(0)
    return d_x, planes.new_empty(planes.shape if wanted[1] else 0)


def _save(arguments: tuple[Tensor, Tensor], y: Tensor) -> Saved:
    return Saved(arguments)


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> list[Tensor | None]:
    x, planes = saved.tensors
    found = backward(gradients[0].contiguous(), x.contiguous(), planes, list(needs))
    return [g if need else None for g, need in zip(found, needs, strict=True)]


OPERATOR: Operator[Tensor] = Operator(
    "givens",
    reference=reference.givens,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake_forward, _fake_backward),
    rule=Rule(_save, _gradients),
)

"""A block-diagonal map of the last axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.block_rotate import cpu, reference
from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.precision import autocast

__all__ = ["OPERATOR", "block_rotate"]


def block_rotate(x: Tensor, rotation: Tensor, *, recover: bool = False) -> Tensor:
    """``x blockdiag(R_1, ..., R_n)``.

    The backward pass keeps ``x``, which rotations of one stream (of query, key and value) share.

    Args:
        x: (..., n * b).
        rotation: the blocks (n, b, b), in the type of ``x`` or a wider one.
        recover: keep ``y`` instead, and get ``x = y R^T``: right only for orthogonal blocks, and
            better only where ``y`` is kept by what follows and ``x`` by nothing.
    """
    x, _ = autocast(x)
    return OPERATOR(x, rotation, recover)


def _fake_forward(x: Tensor, rotation: Tensor, recover: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    dy: Tensor, kept: Tensor, rotation: Tensor, recover: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(dy) if wanted[0] else dy.new_empty(0)
    return d_x, rotation.new_empty(rotation.shape if wanted[1] else 0)


def _save(arguments: tuple[Tensor, Tensor, bool], y: Tensor) -> Saved:
    x, rotation, recover = arguments
    return Saved((y if recover else x, rotation), (recover,))


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor | None, Tensor | None, None]:
    kept, rotation = saved.tensors
    d_x, d_rotation = backward(
        gradients[0].contiguous(), kept.contiguous(), rotation, *saved.constants, list(needs[:2])
    )
    return d_x if needs[0] else None, d_rotation if needs[1] else None, None


OPERATOR: Operator[Tensor] = Operator(
    "block_rotate",
    reference=reference.block_rotate,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake_forward, _fake_backward),
    rule=Rule(_save, _gradients),
)

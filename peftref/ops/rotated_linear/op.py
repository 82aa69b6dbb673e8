"""A frozen linear of a block-rotated input, as one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.precision import autocast
from peftref.ops.rotated_linear import cpu, reference

__all__ = ["OPERATOR", "rotated_linear"]


def rotated_linear(x: Tensor, rotation: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(x blockdiag(R_1, ..., R_n)) W^T + b``.

    The backward pass keeps ``x`` and recomputes what it needs of the blocks and the weight. Only
    ``x`` and the blocks get a gradient; where ``W`` or ``b`` needs one, the plain form runs.

    Args:
        x: (..., n * b).
        rotation: the blocks (n, b, b), in the type of ``x`` or a wider one. They must be
            orthogonal: the gradient takes ``R^T`` for the inverse.
        weight: ``W`` (d_out, n * b), frozen.
        bias: ``b`` (d_out,), frozen, or None.
    """
    x, [[weight]] = autocast(x, [weight])
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return reference.rotated_linear(x, rotation, weight, bias)
    return OPERATOR(x, rotation, weight, bias)


def _fake_forward(x: Tensor, rotation: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    dy: Tensor, x: Tensor, rotation: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(x) if wanted[0] else dy.new_empty(0)
    return d_x, rotation.new_empty(rotation.shape if wanted[1] else 0)


def _save(arguments: tuple[Tensor, Tensor, Tensor, Tensor | None], y: Tensor) -> Saved:
    return Saved(arguments[:3])


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> list[Tensor | None]:
    x, rotation, weight = saved.tensors
    found = backward(gradients[0].contiguous(), x.contiguous(), rotation, weight, list(needs[:2]))
    return [g if need else None for g, need in zip(found, needs[:2], strict=True)] + [None, None]


OPERATOR: Operator[Tensor] = Operator(
    "rotated_linear",
    reference=reference.rotated_linear,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake_forward, _fake_backward),
    rule=Rule(_save, _gradients),
)

"""Cross-entropy of a linear layer whose logits never exist as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.linear_cross_entropy import cpu, reference
from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.precision import autocast
from peftref.ops.sums import wide

__all__ = ["OPERATOR", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean: bool = True,
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), labels)``, in float32 or wider.

    The gradients are computed with the loss, chunk by chunk of rows, and only the wanted ones.
    After Liger, Hsu et al. 2024, https://arxiv.org/abs/2410.10989

    Args:
        hidden: (..., d).
        weight: (classes, d).
        bias: (classes,), or None.
        labels: (...), class numbers or ``ignore_index``; not shifted here.
        ignore_index: label of positions that do not count.
        label_smoothing: share of the target spread over all classes.
        mean: over the positions that count, or the sum.
    """
    hidden, [[weight], biases] = autocast(hidden, [weight], [] if bias is None else [bias])
    bias = biases[0] if biases else None
    tensors = (hidden, weight, bias)
    grad = torch.is_grad_enabled()
    # A tuple: a list would be taken for one of tensors.
    wanted = tuple(t is not None and grad and t.requires_grad for t in tensors)
    flat = hidden.reshape(-1, hidden.shape[-1])
    options = (ignore_index, label_smoothing, mean)
    return OPERATOR(flat, weight, bias, labels.reshape(-1), *options, wanted)


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    wanted: list[bool],
) -> list[Tensor]:
    return [
        hidden.new_empty((), dtype=wide(hidden)),
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    ]


def _fake_backward(gradient: Tensor, parts: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(part) for part in parts]


def _save(arguments: tuple[object, ...], results: list[Tensor]) -> Saved:
    return Saved(results[1:])


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., list[Tensor]],
) -> list[Tensor | None]:
    found = backward(gradients[0], list(saved.tensors))
    wanted = [g if need else None for g, need in zip(found, needs[:3], strict=True)]
    return [*wanted, *[None] * 5]


OPERATOR: Operator[Tensor] = Operator(
    "linear_cross_entropy",
    reference=reference.linear_cross_entropy,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake_forward, _fake_backward),
    rule=Rule(_save, _gradients, hidden=3),
)

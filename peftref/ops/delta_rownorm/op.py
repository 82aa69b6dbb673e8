"""Row norms of a weight with a low-rank addition, which is not formed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.delta_rownorm import cpu, reference
from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.sums import wide

__all__ = ["OPERATOR", "delta_rownorm"]


def delta_rownorm(
    weight: Tensor, down: Tensor, up: Tensor, scale: Tensor, squares: Tensor | None = None
) -> Tensor:
    """``||W + s B A||`` of every row (d_out,), in float32 or wider.

    Sums are in that type, also under autocast; where ``W`` is nearly cancelled the result has an
    error of the order of ``sqrt(eps) ||W||``. ``A`` and ``B`` get a gradient; where ``W`` needs
    one, the plain form runs.

    Args:
        weight: ``W`` (d_out, d_in), frozen.
        down: ``A`` (r, d_in).
        up: ``B`` (d_out, r).
        scale: ``s`` (), a constant.
        squares: ``||W||^2`` (d_out,) in the result's type; computed if not given. Whoever keeps it
            must renew it when the weight changes.
    """
    with torch.autocast(weight.device.type, enabled=False):
        if weight.requires_grad:
            return reference.delta_rownorm(weight, down, up, scale, squares)
        return OPERATOR(weight, down, up, scale, squares)


def _fake_forward(
    weight: Tensor, down: Tensor, up: Tensor, scale: Tensor, squares: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = wide(weight, down, up)
    crossed = weight.new_empty(weight.shape[0], down.shape[0], dtype=dtype)
    return weight.new_empty(weight.shape[0], dtype=dtype), crossed


def _fake_backward(
    gradient: Tensor,
    norm: Tensor,
    crossed: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    return norm.new_empty(down.shape), norm.new_empty(up.shape)


def _save(arguments: tuple[Tensor, ...], results: tuple[Tensor, Tensor]) -> Saved:
    return Saved((*results, *arguments[:4]))


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> list[Tensor | None]:
    *_, down, up, _ = saved.tensors
    d_down, d_up = backward(gradients[0].contiguous(), *saved.tensors)
    found = (d_down.to(down.dtype) if needs[1] else None, d_up.to(up.dtype) if needs[2] else None)
    return [None, *found, None, None]


OPERATOR: Operator[Tensor] = Operator(
    "delta_rownorm",
    reference=reference.delta_rownorm,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake_forward, _fake_backward),
    rule=Rule(_save, _gradients, hidden=1),
)

"""A frozen linear with a low-rank addition and a scale of each output, as one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.dora_linear import cpu, reference
from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.precision import autocast
from peftref.ops.sums import wide

__all__ = ["OPERATOR", "dora_linear"]


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ratio: Tensor,
) -> Tensor:
    """``y = (x W^T + s (x A^T) B^T) * c + b``, with ``c = m / ||W + s B A||`` for DoRA.

    Beside ``x`` the backward pass keeps ``x A^T`` and ``y``, and the latter only if ``c`` needs a
    gradient; most of what can follow keeps ``y`` too. Everything but ``W`` and ``s`` gets a
    gradient; where one of them needs it, the plain form runs.

    Args:
        x: (..., d_in).
        weight: ``W`` (d_out, d_in), frozen.
        bias: ``b`` (d_out,), or None.
        down: ``A`` (r, d_in), in the type of ``x`` or a wider one; so are ``up`` and ``ratio``.
        up: ``B`` (d_out, r).
        scale: ``s`` (), a constant.
        ratio: ``c`` (d_out,); ``magnitude / delta_rownorm(...)`` makes it DoRA.
    """
    x, [[weight]] = autocast(x, [weight])
    if weight.requires_grad or scale.requires_grad:
        return reference.dora_linear(x, weight, bias, down, up, scale, ratio)
    return OPERATOR(x, weight, bias, down, up, scale, ratio)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ratio: Tensor,
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).shape[0]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, down.shape[0])


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ratio: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    dtype, none = wide(dy, ratio), 0
    return [
        torch.empty_like(x) if wanted[0] else x.new_empty(none),
        dy.new_empty(ratio.shape if wanted[1] else none, dtype=dtype),
        down.new_empty(down.shape if wanted[2] else none),
        up.new_empty(up.shape if wanted[3] else none),
        dy.new_empty(none if y is None else ratio.shape, dtype=dtype),
    ]


def _save(
    arguments: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
) -> Saved:
    x, weight, bias, down, up, scale, ratio = arguments
    y, hidden = results
    held = [x, hidden, weight, down, up, scale, ratio]
    if bias is not None:
        held.append(bias)
    if ratio.requires_grad:
        held.append(y)
    return Saved(held, (bias is not None, ratio.requires_grad))


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., list[Tensor]],
) -> list[Tensor | None]:
    x, hidden, weight, down, up, scale, ratio, *others = saved.tensors
    has_bias, has_output = saved.constants
    y = others.pop() if has_output else None
    bias = others.pop() if has_bias else None
    wanted = [needs[i] for i in (0, 2, 3, 4, 6)]
    found = backward(
        gradients[0].contiguous(), x.contiguous(), hidden, y,
        weight, bias, down, up, scale, ratio, wanted,
    )  # fmt: skip
    like = (x, bias, down, up, ratio)
    d_x, d_bias, d_down, d_up, d_ratio = (
        g.to(t.dtype) if need and t is not None else None
        for g, t, need in zip(found, like, wanted, strict=True)
    )
    return [d_x, None, d_bias, d_down, d_up, None, d_ratio]


OPERATOR: Operator[Tensor] = Operator(
    "dora_linear",
    reference=reference.dora_linear,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake_forward, _fake_backward),
    rule=Rule(_save, _gradients, hidden=1),
)

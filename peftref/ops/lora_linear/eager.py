"""One target on a CPU without a compiler, where each call of torch counts.

The kernels of ``cpu.py`` for the common case: one target, one type, a scale that is not trained. A
forward and backward pass take half the time of the general path beside the products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftref.ops.lora_linear.cpu import dropped_product, through_dropout
from peftref.ops.operator import refuse_twice

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

    class _Context(FunctionCtx):
        saved_tensors: tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None]
        needs_input_grad: tuple[bool, ...]
        scale: float
        p: float


__all__ = ["Single", "suits"]


def suits(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> bool:
    """Whether ``Single`` computes this; ``x`` is an ordinary tensor on a CPU."""
    dtype = x.dtype
    return (
        down.dtype == up.dtype == weight.dtype == dtype
        and scale.dim() == 0
        and not scale.requires_grad
        and not weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
    )


class Single(torch.autograd.Function):
    """``y = W x + b + s B A dropout(x)``."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
    ) -> Tensor:
        """Keep the hidden side; ``x`` too where ``A`` is trained."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ down.t() if seed is None else dropped_product(rows, down, p, seed)
        y = linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(hidden, up.t(), alpha=scale)
        kept = (x if down.requires_grad else None, hidden, weight, down, up, seed)
        ctx.save_for_backward(*kept)  # pyright: ignore[reportArgumentType] - None is kept as such
        ctx.scale, ctx.p = scale, p
        # Callers may add to it in place, which autograd allows for no view made in here.
        return y.data

    @staticmethod
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, which cannot be differentiated again."""
        (dy,) = grad_outputs
        with torch.no_grad():
            found = _gradients(ctx, dy)
        if torch.is_grad_enabled():
            found = refuse_twice("lora_linear", found, (*ctx.saved_tensors, dy))
        d_x, d_bias, d_down, d_up = found
        return d_x, None, d_bias, d_down, d_up, None, None, None


def _gradients(ctx: _Context, dy: Tensor) -> list[Tensor | None]:
    x, hidden, weight, down, up, seed = ctx.saved_tensors
    wants_x, _, wants_bias, wants_down, wants_up, *_ = ctx.needs_input_grad
    flat = dy.contiguous().view(-1, dy.shape[-1])
    d_bias = flat.sum(0) if wants_bias else None
    # (H^T dY)^T: up to twice as fast as dY^T H, whose result has short rows.
    d_up = (hidden.t() @ flat).mul_(ctx.scale).t().contiguous() if wants_up else None
    d_x = flat @ weight if wants_x else None
    if d_x is None and not wants_down:
        return [None, d_bias, None, d_up]
    d_hidden = (flat @ up).mul_(ctx.scale)
    rows = None if x is None or not wants_down else x.reshape(-1, x.shape[-1])
    if seed is None:
        if d_x is not None:
            d_x.addmm_(d_hidden, down)
        d_down = None if rows is None else d_hidden.t() @ rows
    else:
        into = d_hidden.new_empty(0) if d_x is None else d_x
        d_hidden.mul_(1 / (1 - ctx.p))
        d_down = through_dropout(into, rows, d_hidden, down, ctx.p, seed)
    d_x = None if d_x is None else d_x.view(*dy.shape[:-1], -1)
    return [d_x, d_bias, None if d_down is None else d_down.to(down.dtype), d_up]

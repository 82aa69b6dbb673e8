"""A bottleneck whose wide tensors are written once.

The second bias is one more column of ``U``, and scale and gate are factors of the narrow side, so
that the residual sum, both biases and the factors are all inside two products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftref.ops.bottleneck.reference import ACTIVATIONS

__all__ = ["backward", "forward", "through_factor"]

_aten = torch.ops.aten
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda g, h: _aten.threshold_backward(g, h, 0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda g, h: _aten.gelu_backward(g, h, approximate="tanh"),
    "silu": _aten.silu_backward,
    "tanh": lambda g, h: _aten.tanh_backward(g, torch.tanh(h)),
    "sigmoid": lambda g, h: _aten.sigmoid_backward(g, torch.sigmoid(h)),
    "identity": lambda g, h: g,
}


def forward(
    x: Tensor,
    into: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor,
    gate: Tensor | None,
    activation: str,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """The output, then ``D x + b_D`` (rows, b)."""
    rows = x.reshape(-1, x.shape[-1])
    bias = None if down_bias is None else down_bias.to(x.dtype)
    hidden = linear(rows, down.to(x.dtype), bias)
    thin = _thin(hidden, activation, up_bias) * _factor(x, scale, gate)
    wide = _wide(up, up_bias, x.dtype)
    given = into if into is not None else x if residual else None
    if given is None:
        return (thin @ wide.t()).view(*x.shape[:-1], -1), hidden
    y = torch.addmm(given.reshape(-1, given.shape[-1]), thin, wide.t()).view(given.shape)
    return y.add_(x) if residual and into is not None else y, hidden


def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor,
    gate: Tensor | None,
    activation: str,
    residual: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, down, its bias, up, its bias, scale and gate; empty if not wanted."""
    found = [dy.new_empty(0) for _ in range(7)]
    flat, width = dy.reshape(-1, dy.shape[-1]), hidden.shape[1]
    factor = _factor(x, scale, gate)
    thin = _thin(hidden, activation, up_bias)
    if wanted[3] or wanted[4]:
        # (S^T dY)^T: faster than dY^T S, whose result has short rows.
        of_wide = ((thin * factor).t() @ flat).t()
        found[3] = of_wide[:, :width].to(up.dtype, copy=True).contiguous()
        if up_bias is not None:
            found[4] = of_wide[:, width].to(up_bias.dtype, copy=True).contiguous()
    of_thin = flat @ _wide(up, up_bias, dy.dtype)
    if wanted[5] or wanted[6]:
        found[5:] = through_factor((of_thin * thin).sum(1), x, scale, gate)
    of_hidden = _DERIVATIVES[activation](of_thin[:, :width] * factor, hidden)
    if wanted[1]:
        found[1] = (of_hidden.t() @ x.reshape(-1, x.shape[-1])).to(down.dtype)
    if wanted[2]:
        found[2] = of_hidden.sum(0)
    if wanted[0]:
        narrow = down.to(dy.dtype)
        d_x = torch.addmm(flat, of_hidden, narrow) if residual else of_hidden @ narrow
        found[0] = d_x.view(x.shape)
    d_x, d_down, d_bias, d_up, d_up_bias, d_scale, d_gate = found
    return d_x, d_down, d_bias, d_up, d_up_bias, d_scale, d_gate


def _thin(hidden: Tensor, activation: str, up_bias: Tensor | None) -> Tensor:
    """``phi(h)``, with a column of ones for the second bias."""
    thin = ACTIVATIONS[activation](hidden)
    return thin if up_bias is None else torch.cat([thin, thin.new_ones(len(thin), 1)], 1)


def _wide(up: Tensor, up_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    up = up.to(dtype)
    return up if up_bias is None else torch.cat([up, up_bias.to(dtype)[:, None]], 1)


def _factor(x: Tensor, scale: Tensor, gate: Tensor | None) -> Tensor:
    """Scale and gate as one number, or one a row (rows, 1)."""
    factor = scale.to(x.dtype)
    if gate is None:
        return factor
    return (gate.to(x.dtype) * factor).expand(*x.shape[:-1], 1).reshape(-1, 1)


def through_factor(
    each: Tensor, x: Tensor, scale: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of scale and gate, from that of the factor of each row."""
    wide = each.to(torch.promote_types(each.dtype, torch.float32)).view(*x.shape[:-1], 1)
    if gate is None:
        return wide.sum().to(scale.dtype), each.new_empty(0)
    d_scale = (wide * gate).sum().to(scale.dtype)
    return d_scale, (wide * scale).sum_to_size(gate.shape).to(gate.dtype)

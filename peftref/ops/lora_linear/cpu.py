"""Low-rank updates added into the frozen product in place.

What makes it fast on a CPU: no second tensor as large as an output (freshly mapped memory costs
more than the product that fills it), thin products with the long side last, and dropout whose mask
and masked stream exist a block at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftref.ops.seed import blocks

__all__ = ["backward", "dropped_product", "forward", "through_dropout"]


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[Tensor],
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """The outputs, then ``A dropout(x)`` of all targets (rows, sum of ranks)."""
    flat = x.reshape(-1, x.shape[-1])
    down = _stacked(downs, x.dtype)
    hidden = flat @ down.t() if seed is None else dropped_product(flat, down, p, seed)
    outputs: list[Tensor] = []
    for i, part in enumerate(_parts(hidden, downs)):
        y = linear(flat, weights[i], biases[i] if biases else None)
        y.addmm_(part * scales[i].to(x.dtype), ups[i].to(x.dtype).t())
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return [*outputs, hidden]


def backward(
    gradients: list[Tensor],
    x: Tensor | None,
    hidden: Tensor,
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[Tensor],
    p: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of x, each bias, down, up and scale; empty where ``wanted`` says no."""
    flat = [dy.reshape(-1, dy.shape[-1]) for dy in gradients]
    targets = [
        _through_up(dy, part, up, scale, wanted)
        for dy, part, up, scale in zip(flat, _parts(hidden, downs), ups, scales, strict=True)
    ]
    d_hidden = targets[0].hidden
    if len(targets) > 1:
        d_hidden = torch.cat([t.hidden for t in targets], 1)
    d_x = hidden.new_empty(0)
    if wanted[0]:
        d_x = flat[0] @ weights[0]
        for dy, weight in zip(flat[1:], weights[1:], strict=True):
            d_x.addmm_(dy, weight)
    d_downs = _through_down(d_x, x, d_hidden, downs, p, seed)
    shape = (*gradients[0].shape[:-1], weights[0].shape[1])
    return [
        d_x.view(shape) if wanted[0] else d_x,
        *(t.bias for t in targets),
        *d_downs,
        *(t.up for t in targets),
        *(t.scale for t in targets),
    ]


class _Through(NamedTuple):
    """The gradients that one target's output gives."""

    bias: Tensor
    up: Tensor
    scale: Tensor
    hidden: Tensor


def _through_up(
    dy: Tensor, hidden: Tensor, up: Tensor, scale: Tensor, wanted: list[bool]
) -> _Through:
    narrow = scale.to(dy.dtype)
    d_bias = dy.sum(0) if wanted[1] else hidden.new_empty(0)
    d_up = hidden.new_empty(0)
    if wanted[3]:
        # (S^T dY)^T: up to twice as fast as dY^T S, whose result has short rows.
        d_up = ((hidden * narrow).t() @ dy).t().contiguous().to(up.dtype)
    d_scaled = dy @ up.to(dy.dtype)
    d_scale = hidden.new_empty(0)
    if wanted[4]:
        wide = torch.promote_types(dy.dtype, torch.float32)
        terms = d_scaled.to(wide) * hidden
        d_scale = terms.sum(0 if scale.dim() else None).view(scale.shape).to(scale.dtype)
    return _Through(d_bias, d_up, d_scale, d_scaled.mul_(narrow))


def _through_down(
    d_x: Tensor,
    x: Tensor | None,
    d_hidden: Tensor,
    downs: list[Tensor],
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """Add to ``d_x`` (empty: not wanted); return the gradients of ``downs`` where x is given."""
    down = _stacked(downs, d_hidden.dtype)
    rows = None if x is None else x.reshape(-1, down.shape[1])
    if seed is not None:
        d_down = through_dropout(d_x, rows, d_hidden.mul_(1 / (1 - p)), down, p, seed)
    else:
        if d_x.numel():
            d_x.addmm_(d_hidden, down)
        d_down = None if rows is None else d_hidden.t() @ rows
    if d_down is None:
        return [d_hidden.new_empty(0) for _ in downs]
    if len(downs) == 1:
        return [d_down.to(downs[0].dtype)]
    parts = d_down.split([down.shape[0] for down in downs])
    return [part.to(down.dtype, copy=True) for part, down in zip(parts, downs, strict=True)]


def dropped_product(x: Tensor, down: Tensor, p: float, seed: Tensor) -> Tensor:
    """``dropout(x) A^T``."""
    hidden = x.new_empty(x.shape[0], down.shape[0])
    for start, stop, mask, room in blocks(seed, *x.shape, p=p, dtype=x.dtype):
        torch.mul(x[start:stop], mask, out=room)
        torch.mm(room, down.t(), out=hidden[start:stop])
    return hidden.mul_(1 / (1 - p))


def through_dropout(
    d_x: Tensor, x: Tensor | None, d_hidden: Tensor, down: Tensor, p: float, seed: Tensor
) -> Tensor | None:
    """``d_x += keep * (dH A)``, and ``dH^T (keep * x)``."""
    wide = torch.promote_types(down.dtype, torch.float32)
    d_down = None if x is None else torch.zeros(down.shape, dtype=wide)
    rows, columns = d_hidden.shape[0], down.shape[1]
    for start, stop, mask, room in blocks(seed, rows, columns, p=p, dtype=down.dtype):
        part = d_hidden[start:stop]
        if x is not None and d_down is not None:
            torch.mul(x[start:stop], mask, out=room)
            if wide == down.dtype:
                d_down.addmm_(part.t(), room)
            else:
                d_down += part.t() @ room
        if d_x.numel():
            torch.mm(part, down, out=room)
            d_x[start:stop].addcmul_(room, mask)
    return d_down


def _stacked(downs: list[Tensor], dtype: torch.dtype) -> Tensor:
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    return down.to(dtype)


def _parts(hidden: Tensor, downs: list[Tensor]) -> tuple[Tensor, ...]:
    """What of ``hidden`` each target made."""
    return (hidden,) if len(downs) == 1 else hidden.split([down.shape[0] for down in downs], 1)

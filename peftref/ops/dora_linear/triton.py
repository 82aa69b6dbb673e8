"""A linear map with a low-rank addition and a scale of each output, on a GPU.

The products are cuBLAS'; scale and bias are one pass in place, and so are the scaled gradient and
the two sums that give the gradient of the scale.
"""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftref.ops.dora_linear import cpu
from peftref.ops.scale_shift import triton as scale_shift
from peftref.ops.sums import wide
from peftref.ops.tiles import HALVES, Variant, padded_rank, pointers

__all__ = ["backward", "forward", "variants"]

_ROWS, _COLUMNS, _DEPTH = 64, 16, 32
_RANKS = (16, 32, 64, 128)


@triton.jit
def _rescue(
    p_dy, p_x, p_weight, p_hidden, p_up, p_ratio, p_d_ratio, n_rows, n_columns, n_depth, n_rank,
    small, BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, RANK: tl.constexpr,
):
    """``sum_t dy (x W^T + S B^T)`` of outputs with a ratio below ``small``; others: no work."""
    i_columns = tl.program_id(0) * BC + tl.arange(0, BC)
    held = i_columns < n_columns
    lost = tl.abs(tl.load(p_ratio + i_columns, mask=held, other=1.0)) < small
    if tl.max(lost.to(tl.int32), 0) == 0:
        return
    i_rank = tl.arange(0, RANK)
    b_up = tl.load(
        p_up + i_columns[None, :] * n_rank + i_rank[:, None],
        mask=held[None, :] & (i_rank < n_rank)[:, None], other=0.0,
    )
    b_sum = tl.zeros((BC,), tl.float32)
    for start in range(0, n_rows, BR):
        i_rows = start + tl.arange(0, BR)
        inside = (i_rows < n_rows)[:, None] & held[None, :]
        offsets = i_rows.to(tl.int64)[:, None] * n_columns + i_columns[None, :]
        b_hidden = tl.load(
            p_hidden + i_rows[:, None] * n_rank + i_rank[None, :],
            mask=(i_rows < n_rows)[:, None] & (i_rank < n_rank)[None, :], other=0.0,
        )
        b_y = tl.dot(b_hidden, b_up, input_precision="ieee")
        for deep in range(0, n_depth, BD):
            i_depth = deep + tl.arange(0, BD)
            b_x = tl.load(
                p_x + i_rows.to(tl.int64)[:, None] * n_depth + i_depth[None, :],
                mask=(i_rows < n_rows)[:, None] & (i_depth < n_depth)[None, :], other=0.0,
            )
            b_weight = tl.load(
                p_weight + i_columns.to(tl.int64)[None, :] * n_depth + i_depth[:, None],
                mask=held[None, :] & (i_depth < n_depth)[:, None], other=0.0,
            )
            b_y = tl.dot(b_x, b_weight, b_y, input_precision="ieee")
        b_dy = tl.load(p_dy + offsets, mask=inside, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_dy * b_y, 0)
    tl.store(p_d_ratio + i_columns, b_sum, mask=held & lost)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    ratio: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output, and ``x A^T`` (rows, r) for the backward pass."""
    if x.dtype == torch.float64:
        return cpu.forward(x, weight, bias, down, up, scale, ratio)
    flat = x.reshape(-1, x.shape[-1])
    hidden = flat @ down.to(x.dtype).t()
    y = flat @ weight.t()
    y.addmm_(hidden, (up * scale).to(x.dtype).t())
    scale_shift.forward(y, ratio, bias, y)
    return y.view(*x.shape[:-1], y.shape[-1]), hidden


def backward(
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
    """The gradients of x, bias, down, up and ratio; empty where ``wanted`` says no."""
    if x.dtype == torch.float64:
        return cpu.backward(dy, x, hidden, y, weight, bias, down, up, scale, ratio, wanted)
    flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    needs = [True, y is not None, wanted[1] or y is not None]
    scaled, dots, sums = scale_shift.backward(
        dy, dy if y is None else y.reshape(dy.shape), ratio, needs
    )
    d_ratio = dy.new_empty(0, dtype=wide(dy, ratio))
    if y is not None:
        d_ratio = cpu.ratio_gradient(dots, sums, bias, ratio)
        _launch_rescue(d_ratio, dy, flat, (weight, hidden, up * scale), ratio)
    d_x, d_down, d_up = cpu.low_rank_backward(
        scaled, flat, hidden, weight, (down, up), scale.to(ratio).expand_as(ratio), wanted
    )
    d_bias = sums if wanted[1] else d_ratio.new_empty(0)
    return [d_x.view(x.shape) if wanted[0] else d_x, d_bias, d_down, d_up, d_ratio]


def _launch_rescue(
    d_ratio: Tensor,
    dy: Tensor,
    x: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    ratio: Tensor,
) -> None:
    """Without asking the GPU whether there is anything to do, which would mean to wait for it."""
    weight, hidden, up = factors
    rank = hidden.shape[1]
    if rank > _RANKS[-1]:
        cpu.rescue(d_ratio, dy, (x, hidden), (weight, up), ratio)
        return
    (rows, columns), depth = dy.shape, x.shape[1]
    _rescue[triton.cdiv(columns, _COLUMNS),](
        dy, x, weight.contiguous(), hidden, up.to(x.dtype), ratio, d_ratio,
        rows, columns, depth, rank, cpu.SMALL,
        BR=_ROWS, BC=_COLUMNS, BD=_DEPTH, RANK=padded_rank(rank),
        num_warps=4, num_stages=2,
    )


def variants() -> Iterator[Variant]:
    """The kernel of the unlikely case; the others are those of ``scale_shift``."""
    sizes = dict.fromkeys(("n_rows", "n_columns", "n_depth", "n_rank"), "i32")
    for dtype in HALVES:
        for rank in _RANKS:
            yield Variant(
                f"dora_linear rescue {dtype} r={rank}",
                _rescue,
                pointers(dtype, "p_dy", "p_x", "p_weight", "p_hidden", "p_up")
                | pointers("fp32", "p_ratio", "p_d_ratio")
                | sizes
                | {"small": "fp32"},
                {"BR": _ROWS, "BC": _COLUMNS, "BD": _DEPTH, "RANK": rank},
                num_stages=2,
                unaligned=("n_rank",),
            )

"""Row norms of ``W + s B A`` on a GPU: one kernel, one read of ``W``."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftref.ops.delta_rownorm import cpu
from peftref.ops.tiles import HALVES, Variant, padded_rank, pointers

__all__ = ["backward", "forward", "variants"]

_ROWS, _COLUMNS = 32, 32
_RANKS = (16, 32, 64)  # larger ones do not fit the registers


@triton.jit
def _rownorm(
    p_weight, p_down, p_gram, p_up, p_scale, p_squares, p_norm, p_crossed,
    n_rows, n_columns, n_rank,
    BR: tl.constexpr, BC: tl.constexpr, RANK: tl.constexpr,
):
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    i_rank = tl.arange(0, RANK)
    inside, ranked = i_rows < n_rows, i_rank < n_rank
    b_crossed = tl.zeros((BR, RANK), tl.float32)
    b_total = tl.zeros((BR,), tl.float32)
    p_weight += i_rows.to(tl.int64)[:, None] * n_columns
    for start in range(0, n_columns, BC):
        i_columns = start + tl.arange(0, BC)
        held = i_columns < n_columns
        b_weight = tl.load(
            p_weight + i_columns[None, :], mask=inside[:, None] & held[None, :], other=0.0
        ).to(tl.float32)
        b_down = tl.load(
            p_down + i_rank[:, None] * n_columns + i_columns[None, :],
            mask=ranked[:, None] & held[None, :], other=0.0,
        ).to(tl.float32)
        # Three products of the tensor cores' type give float32's precision.
        b_crossed = tl.dot(b_weight, tl.trans(b_down), b_crossed, input_precision="tf32x3")
        if p_squares is None:
            b_total += tl.sum(b_weight * b_weight, 1)
    if p_squares is not None:
        b_total = tl.load(p_squares + i_rows, mask=inside, other=0.0)
    places = i_rows[:, None] * n_rank + i_rank[None, :]
    both = inside[:, None] & ranked[None, :]
    b_up = tl.load(p_up + places, mask=both, other=0.0).to(tl.float32) * tl.load(p_scale)
    both_ranks = ranked[:, None] & ranked[None, :]
    b_gram = tl.load(
        p_gram + i_rank[:, None] * n_rank + i_rank[None, :], mask=both_ranks, other=0.0
    )
    b_low = tl.dot(b_up, b_gram, 2 * b_crossed, input_precision="tf32x3")
    b_total += tl.sum(b_low * b_up, 1)
    tl.store(p_norm + i_rows, tl.sqrt(tl.maximum(b_total, 0.0)), mask=inside)
    tl.store(p_crossed + places, b_crossed, mask=both)


def forward(
    weight: Tensor, down: Tensor, up: Tensor, scale: Tensor, squares: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norms, and ``W A^T`` for the backward pass, in float32."""
    if down.shape[0] > _RANKS[-1] or weight.dtype == torch.float64:
        return cpu.forward(weight, down, up, scale, squares)
    weight, down, up = weight.contiguous(), down.contiguous(), up.contiguous()
    (rows, columns), rank = weight.shape, down.shape[0]
    norm = weight.new_empty(rows, dtype=torch.float32)
    crossed = weight.new_empty(rows, rank, dtype=torch.float32)
    _rownorm[triton.cdiv(rows, _ROWS),](
        weight, down, cpu.gram(down, torch.float32), up, scale.float(), squares, norm, crossed,
        rows, columns, rank,
        BR=_ROWS, BC=_COLUMNS, RANK=padded_rank(rank), num_warps=4, num_stages=2,
    )
    return norm, crossed


# Thin products and one with the weight; few set the norm free of the detachment that skips it.
backward = cpu.backward


def variants() -> Iterator[Variant]:
    """The ranks and types that a launch can ask for."""
    sizes = dict.fromkeys(("n_rows", "n_columns", "n_rank"), "i32")
    outputs = pointers("fp32", "p_down", "p_gram", "p_up", "p_scale", "p_norm", "p_crossed")
    for dtype in (*HALVES, "fp32"):
        for rank in _RANKS:
            yield Variant(
                f"delta_rownorm {dtype} r={rank}",
                _rownorm,
                pointers(dtype, "p_weight") | outputs | sizes | {"p_squares": "*fp32"},
                {"BR": _ROWS, "BC": _COLUMNS, "RANK": rank},
                num_stages=2,
                unaligned=("n_rank",),
            )

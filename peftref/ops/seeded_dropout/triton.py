"""Dropout from a seed on a GPU: one read, one write, the mask in registers."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftref.ops.seed import threshold
from peftref.ops.tiles import HALVES, Variant, kept, pointers

__all__ = ["backward", "forward", "variants"]

_ROWS, _COLUMNS = 16, 256


@triton.jit
def _dropout(
    p_x, p_y, p_seed, n_rows, n_columns, least, scale, BR: tl.constexpr, BC: tl.constexpr
):
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    i_columns = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (i_rows < n_rows)[:, None] & (i_columns < n_columns)[None, :]
    offsets = i_rows.to(tl.int64)[:, None] * n_columns + i_columns[None, :]
    b_x = tl.load(p_x + offsets, mask=inside, other=0.0).to(tl.float32)
    stays = kept(p_seed, i_rows, i_columns, least)
    b_y = tl.where(stays, b_x * scale, 0.0)
    tl.store(p_y + offsets, b_y.to(p_y.dtype.element_ty), mask=inside)


def forward(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``keep * x / (1 - p)``; the gradient is the same map."""
    x = x.contiguous()
    y = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _dropout[grid](
        x, y, seed, rows, columns, threshold(p), 1 / (1 - p), BR=_ROWS, BC=_COLUMNS, num_warps=4
    )
    return y


backward = forward


def variants() -> Iterator[Variant]:
    """Every form of the kernel that a launch can ask for."""
    sizes = dict.fromkeys(("n_rows", "n_columns", "least"), "i32")
    for dtype in HALVES:
        yield Variant(
            f"seeded_dropout {dtype}",
            _dropout,
            pointers(dtype, "p_x", "p_y") | {"p_seed": "*i32", "scale": "fp32"} | sizes,
            {"BR": _ROWS, "BC": _COLUMNS},
            unaligned=("least",),
        )

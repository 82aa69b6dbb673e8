"""Elementwise scale and shift on a GPU: the gradient reads ``dy`` and ``x`` once."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftref.ops.sums import wide
from peftref.ops.tiles import HALVES, Variant, pointers

__all__ = ["backward", "forward", "variants"]

_ROWS, _COLUMNS = 16, 128
_PROGRAMS = 1024  # some for every multiprocessor


@triton.jit
def _scale_shift(
    p_x, p_scale, p_shift, p_y, n_rows, n_columns, BR: tl.constexpr, BC: tl.constexpr
):
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    i_columns = tl.program_id(1) * BC + tl.arange(0, BC)
    held = i_columns < n_columns
    inside = (i_rows < n_rows)[:, None] & held[None, :]
    offsets = i_rows.to(tl.int64)[:, None] * n_columns + i_columns[None, :]
    b_y = tl.load(p_x + offsets, mask=inside, other=0.0).to(tl.float32)
    b_y *= tl.load(p_scale + i_columns, mask=held, other=0.0).to(tl.float32)[None, :]
    if p_shift is not None:
        b_y += tl.load(p_shift + i_columns, mask=held, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + offsets, b_y.to(p_y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    p_dy, p_x, p_scale, p_dx, p_dscale, p_dshift, n_rows, n_columns,
    BR: tl.constexpr, BC: tl.constexpr,
):
    i_columns = tl.program_id(0) * BC + tl.arange(0, BC)
    held = i_columns < n_columns
    b_scale = tl.load(p_scale + i_columns, mask=held, other=0.0).to(tl.float32)[None, :]
    b_dscale = tl.zeros((BR, BC), tl.float32)
    b_dshift = tl.zeros((BR, BC), tl.float32)
    for start in range(tl.program_id(1) * BR, n_rows, tl.num_programs(1) * BR):
        i_rows = start + tl.arange(0, BR)
        inside = (i_rows < n_rows)[:, None] & held[None, :]
        offsets = i_rows.to(tl.int64)[:, None] * n_columns + i_columns[None, :]
        b_dy = tl.load(p_dy + offsets, mask=inside, other=0.0).to(tl.float32)
        if p_dscale is not None:
            b_dscale += b_dy * tl.load(p_x + offsets, mask=inside, other=0.0).to(tl.float32)
        if p_dshift is not None:
            b_dshift += b_dy
        if p_dx is not None:
            b_dx = b_dy * b_scale
            tl.store(p_dx + offsets, b_dx.to(p_dx.dtype.element_ty), mask=inside)
    place = tl.program_id(1) * n_columns + i_columns
    if p_dscale is not None:
        tl.store(p_dscale + place, tl.sum(b_dscale, 0), mask=held)
    if p_dshift is not None:
        tl.store(p_dshift + place, tl.sum(b_dshift, 0), mask=held)


def forward(x: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``x * scale + shift``, written to ``out``, which may be ``x``."""
    x = x.contiguous()
    y = torch.empty_like(x) if out is None else out
    columns = x.shape[-1]
    rows = x.numel() // columns
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _scale_shift[grid](x, scale, shift, y, rows, columns, BR=_ROWS, BC=_COLUMNS, num_warps=4)
    return y


def backward(
    dy: Tensor, x: Tensor, scale: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx = dy * scale``, ``dscale = sum(dy * x)``, ``dshift = sum(dy)``; empty if not needed."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    across = -(-columns // _COLUMNS)
    splits = max(1, min(-(-rows // _ROWS), _PROGRAMS // across))
    dx = torch.empty_like(x) if needs[0] else None
    sums = [x.new_empty(splits, columns, dtype=torch.float32) if n else None for n in needs[1:]]
    _backward[across, splits](
        dy, x, scale, dx, *sums, rows, columns, BR=_ROWS, BC=_COLUMNS, num_warps=4
    )
    dtype = wide(dy, scale)
    dscale, dshift = (
        dy.new_empty(0, dtype=dtype) if s is None else s.sum(0, dtype=dtype) for s in sums
    )
    return dy.new_empty(0) if dx is None else dx, dscale, dshift


def variants() -> Iterator[Variant]:
    """Every form of the kernels that a launch can ask for, in 16 bits."""
    sizes = dict.fromkeys(("n_rows", "n_columns"), "i32")
    tile: dict[str, int | bool | str | None] = {"BR": _ROWS, "BC": _COLUMNS}
    wide_scale = {"p_scale": "*fp32"} | sizes
    for dtype in HALVES:
        forms = pointers(dtype, "p_x", "p_y") | wide_scale
        yield Variant(f"scale_shift {dtype}", _scale_shift, forms | {"p_shift": "*fp32"}, tile)
        yield Variant(f"scale {dtype}", _scale_shift, forms, tile | {"p_shift": None})
        forms = pointers(dtype, "p_x", "p_dy", "p_dx") | wide_scale | pointers("fp32", "p_dscale")
        yield Variant(
            f"scale_shift_backward {dtype}", _backward, forms | {"p_dshift": "*fp32"}, tile
        )
        yield Variant(f"scale_backward {dtype}", _backward, forms, tile | {"p_dshift": None})

"""A block-diagonal map of the last axis on a GPU: the backward pass reads ``x`` and ``dy`` once."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftref.ops.block_rotate import cpu
from peftref.ops.tiles import HALVES, Variant, padded_rank, pointers

__all__ = ["backward", "forward", "gradients", "rotated", "variants"]

_ROWS = 64
_WIDEST = 64  # wider ones do not fit the registers, and are large enough for cuBLAS
_PROGRAMS = 1024


@triton.jit
def _tile(p, i_rows, i_columns, n_rows, n_columns, inside):
    """Addresses and mask of a tile; ``inside``: the columns that are of this block."""
    offsets = i_rows.to(tl.int64)[:, None] * n_columns + i_columns[None, :]
    held = (i_rows < n_rows)[:, None] & (inside & (i_columns < n_columns))[None, :]
    return p + offsets, held


@triton.jit
def _block(p_rotation, i_block, n_block, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    held = (i < n_block)[:, None] & (i < n_block)[None, :]
    p_rotation += (i_block * n_block + i[:, None]) * n_block + i[None, :]
    return tl.load(p_rotation, mask=held, other=0.0)


@triton.jit
def _rotate(
    p_x, p_rotation, p_y, n_rows, n_columns, n_block, BR: tl.constexpr, BLOCK: tl.constexpr
):
    i_block = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    places, held = _tile(p_x, i_rows, i_block * n_block + i, n_rows, n_columns, i < n_block)
    b_x = tl.load(places, mask=held, other=0.0)
    b_rotation = _block(p_rotation, i_block, n_block, BLOCK).to(b_x.dtype)
    b_y = tl.dot(b_x, b_rotation, input_precision="tf32x3")
    places, held = _tile(p_y, i_rows, i_block * n_block + i, n_rows, n_columns, i < n_block)
    tl.store(places, b_y.to(p_y.dtype.element_ty), mask=held)


@triton.jit
def _backward(
    p_dy, p_kept, p_rotation, p_dx, p_drotation, n_rows, n_columns, n_block, n_blocks,
    RECOVER: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):
    i_block, i_split = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    b_inverse = tl.trans(_block(p_rotation, i_block, n_block, BLOCK))
    b_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(i_split * BR, n_rows, tl.num_programs(1) * BR):
        i_rows = start + tl.arange(0, BR)
        i_columns = i_block * n_block + i
        places, held = _tile(p_dy, i_rows, i_columns, n_rows, n_columns, i < n_block)
        b_dy = tl.load(places, mask=held, other=0.0)
        if p_drotation is not None:
            places, held = _tile(p_kept, i_rows, i_columns, n_rows, n_columns, i < n_block)
            b_x = tl.load(places, mask=held, other=0.0)
            if RECOVER:
                b_x = tl.dot(b_x, b_inverse.to(b_x.dtype), input_precision="tf32x3").to(b_dy.dtype)
            b_sum = tl.dot(tl.trans(b_x), b_dy, b_sum, input_precision="tf32x3")
        if p_dx is not None:
            b_dx = tl.dot(b_dy, b_inverse.to(b_dy.dtype), input_precision="tf32x3")
            places, held = _tile(p_dx, i_rows, i_columns, n_rows, n_columns, i < n_block)
            tl.store(places, b_dx.to(p_dx.dtype.element_ty), mask=held)
    if p_drotation is not None:
        held = (i < n_block)[:, None] & (i < n_block)[None, :]
        p_drotation += ((i_split * n_blocks + i_block) * n_block + i[:, None]) * n_block
        tl.store(p_drotation + i[None, :], b_sum, mask=held)


def forward(x: Tensor, rotation: Tensor, recover: bool) -> Tensor:
    """``x blockdiag(R)``."""
    if not _fits(x, rotation):
        return cpu.forward(x, rotation, recover)
    return rotated(x.reshape(-1, x.shape[-1]), rotation).view(x.shape)


def backward(
    dy: Tensor, kept: Tensor, rotation: Tensor, recover: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """``dx = dy R^T`` and ``dR = x^T dy``, block by block; empty if not wanted."""
    if not _fits(dy, rotation):
        return cpu.backward(dy, kept, rotation, recover, wanted)
    flat, kept = dy.reshape(-1, dy.shape[-1]), kept.reshape(-1, dy.shape[-1])
    d_x, d_rotation = gradients(flat, kept, rotation, recover, wanted)
    return d_x.view(dy.shape) if wanted[0] else d_x, d_rotation.to(rotation.dtype)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """``x blockdiag(R)`` of rows (t, d); of a last block that exceeds ``d``, the upper left."""
    x, rotation = x.contiguous(), rotation.contiguous()
    y = torch.empty_like(x)
    (rows, columns), (blocks, block, _) = x.shape, rotation.shape
    _rotate[triton.cdiv(rows, _ROWS), blocks](
        x, rotation, y, rows, columns, block,
        BR=_ROWS, BLOCK=padded_rank(block), num_warps=_warps(block),
    )
    return y


def gradients(
    dy: Tensor, kept: Tensor, rotation: Tensor, recover: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """``dx`` and ``dR`` of rows, the latter in float32; empty if not wanted."""
    rotation = rotation.contiguous()
    (rows, columns), (blocks, block, _) = dy.shape, rotation.shape
    splits = max(1, min(-(-rows // _ROWS), _PROGRAMS // blocks))
    d_x = torch.empty_like(dy) if wanted[0] else None
    parts = dy.new_empty(splits, *rotation.shape, dtype=torch.float32) if wanted[1] else None
    _backward[blocks, splits](
        dy, kept, rotation, d_x, parts, rows, columns, block, blocks,
        RECOVER=recover, BR=_ROWS, BLOCK=padded_rank(block), num_warps=_warps(block), num_stages=2,
    )
    d_rotation = dy.new_empty(0) if parts is None else parts.sum(0)
    return dy.new_empty(0) if d_x is None else d_x, d_rotation


def _warps(block: int) -> int:
    return 8 if block > _WIDEST // 2 else 4


def _fits(x: Tensor, rotation: Tensor) -> bool:
    return rotation.shape[-1] <= _WIDEST and x.dtype != torch.float64


def variants() -> Iterator[Variant]:
    """The blocks that a launch can ask for, in 16 bits."""
    sizes = dict.fromkeys(("n_rows", "n_columns", "n_block", "n_blocks"), "i32")
    loose = ("n_block", "n_blocks")
    streams = ("p_x", "p_y", "p_dy", "p_kept", "p_dx")
    for dtype in HALVES:
        shared = pointers(dtype, *streams) | pointers("fp32", "p_rotation", "p_drotation") | sizes
        for block in (16, 32, _WIDEST):
            tile: dict[str, int | bool | str | None] = {"BR": _ROWS, "BLOCK": block}
            yield Variant(
                f"block_rotate {dtype} b={block}", _rotate,
                {k: v for k, v in shared.items() if k in _rotate.arg_names}, tile,
                num_warps=_warps(block), unaligned=loose,
            )
            yield Variant(
                f"block_rotate_backward {dtype} b={block}", _backward,
                {k: v for k, v in shared.items() if k in _backward.arg_names},
                tile | {"RECOVER": True},
                num_warps=_warps(block), num_stages=2, unaligned=loose,
            )

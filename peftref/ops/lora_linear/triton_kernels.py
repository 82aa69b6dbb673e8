"""The kernels of low-rank updates; ``triton.py`` says how they make one op.

``p_`` are pointers, ``b_`` blocks, ``i_`` indices, ``n_`` sizes. A pointer that is None leaves its
part of the kernel out.
"""

# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from peftref.ops.tiles import kept

__all__ = ["k_down", "k_product", "k_through_down", "k_through_up"]


@triton.jit
def _adapter(p_index, i_sample):
    if p_index is None:
        i_adapter = i_sample
    else:
        i_adapter = tl.load(p_index + i_sample).to(tl.int64)
    return i_adapter


@triton.jit
def k_down(
    p_x, p_down, p_hidden, p_index, p_seed, n_rows, n_in, n_rank, stride_adapter, least, keep_scale,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``H = dropout(x) A^T``."""
    i_sample = tl.program_id(1).to(tl.int64)
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_r = tl.program_id(2) * BR + tl.arange(0, BR)
    i_row = i_sample * n_rows + i_m
    p_own = p_down + _adapter(p_index, i_sample) * stride_adapter
    b_hidden = tl.zeros((BM, BR), tl.float32)
    for start in range(0, n_in, BK):
        i_k = start + tl.arange(0, BK)
        inside = (i_m < n_rows)[:, None] & (i_k < n_in)[None, :]
        b_x = tl.load(p_x + i_row[:, None] * n_in + i_k[None, :], mask=inside, other=0.0)
        if p_seed is not None:
            b_x = tl.where(kept(p_seed, i_row, i_k, least), b_x, 0.0)
        inside = (i_r < n_rank)[None, :] & (i_k < n_in)[:, None]
        b_down = tl.load(p_own + i_r[None, :] * n_in + i_k[:, None], mask=inside, other=0.0)
        b_hidden = tl.dot(b_x, b_down, b_hidden, input_precision="ieee")
    if p_seed is not None:
        b_hidden *= keep_scale
    inside = (i_m < n_rows)[:, None] & (i_r < n_rank)[None, :]
    b_hidden = b_hidden.to(p_hidden.dtype.element_ty)
    tl.store(p_hidden + i_row[:, None] * n_rank + i_r[None, :], b_hidden, mask=inside)


@triton.jit
def _thin(p_s, p_scale, i_row, i_r, i_adapter, row_inside, n_rank, stride_s):
    """A tile of ``s H``."""
    inside = row_inside[:, None] & (i_r < n_rank)[None, :]
    b_s = tl.load(p_s + i_row[:, None] * stride_s + i_r[None, :], mask=inside, other=0.0)
    b_scale = tl.load(p_scale + i_adapter * n_rank + i_r, mask=i_r < n_rank, other=0.0)
    return (b_s.to(tl.float32) * b_scale[None, :]).to(p_s.dtype.element_ty)


@triton.jit
def k_product(
    p_x, p_w, p_bias, p_s, p_scale, p_l, p_y, p_index, p_seed,
    n_rows, n_out, n_in, n_rank, stride_wn, stride_wk, stride_s, stride_adapter, stride_ln,
    stride_lr, least, keep_scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``y = x W^T + b + keep * (s S) L^T``."""
    # Eight tiles of rows share the columns that they read while these are in the cache.
    width = 8 * tl.cdiv(n_out, BN)
    first = tl.program_id(0) // width * 8
    height = tl.minimum(tl.cdiv(n_rows, BM) - first, 8)
    i_m = (first + tl.program_id(0) % width % height) * BM + tl.arange(0, BM)
    i_n = tl.program_id(0) % width // height * BN + tl.arange(0, BN)
    i_sample = tl.program_id(1).to(tl.int64)
    i_row = i_sample * n_rows + i_m
    i_adapter = _adapter(p_index, i_sample)
    b_y = tl.zeros((BM, BN), tl.float32)
    p_bw = p_w + i_n.to(tl.int64)[None, :] * stride_wn
    for start in range(0, n_in, BK):
        i_k = start + tl.arange(0, BK)
        inside = (i_m < n_rows)[:, None] & (i_k < n_in)[None, :]
        b_x = tl.load(p_x + i_row[:, None] * n_in + i_k[None, :], mask=inside, other=0.0)
        inside = (i_n < n_out)[None, :] & (i_k < n_in)[:, None]
        b_w = tl.load(p_bw + i_k.to(tl.int64)[:, None] * stride_wk, mask=inside, other=0.0)
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
    b_low = b_y if p_seed is None else tl.zeros((BM, BN), tl.float32)
    p_bl = p_l + i_adapter * stride_adapter + i_n[None, :] * stride_ln
    for start in range(0, n_rank, BR):
        i_r = start + tl.arange(0, BR)
        b_s = _thin(p_s, p_scale, i_row, i_r, i_adapter, i_m < n_rows, n_rank, stride_s)
        inside = (i_n < n_out)[None, :] & (i_r < n_rank)[:, None]
        b_l = tl.load(p_bl + i_r[:, None] * stride_lr, mask=inside, other=0.0)
        b_low = tl.dot(b_s, b_l, b_low, input_precision="ieee")
    if p_seed is not None:
        b_low = b_y + tl.where(kept(p_seed, i_row, i_n, least), b_low * keep_scale, 0.0)
    if p_bias is not None:
        b_low += tl.load(p_bias + i_n, mask=i_n < n_out, other=0.0)[None, :]
    inside = (i_m < n_rows)[:, None] & (i_n < n_out)[None, :]
    p_by = p_y + i_row[:, None] * n_out + i_n[None, :]
    tl.store(p_by, b_low.to(p_y.dtype.element_ty), mask=inside)


@triton.jit
def k_through_up(
    p_dy, p_hidden, p_scale, p_up, p_ds, p_dup, p_index,
    n_rows, n_out, n_rank, stride_s, stride_adapter,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``dB += dY^T (s H)`` and ``dS = dY B``."""
    i_sample = tl.program_id(1).to(tl.int64)
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_r = tl.program_id(2) * BR + tl.arange(0, BR)
    i_row = i_sample * n_rows + i_m
    i_adapter = _adapter(p_index, i_sample)
    b_s = _thin(p_hidden, p_scale, i_row, i_r, i_adapter, i_m < n_rows, n_rank, stride_s)
    b_ds = tl.zeros((BM, BR), tl.float32)
    count = tl.cdiv(n_out, BN)
    for step in range(count):
        # Programs begin at different columns, or all would add to one place at once.
        i_n = (step + tl.program_id(0)) % count * BN + tl.arange(0, BN)
        inside = (i_m < n_rows)[:, None] & (i_n < n_out)[None, :]
        b_dy = tl.load(p_dy + i_row[:, None] * n_out + i_n[None, :], mask=inside, other=0.0)
        inside = (i_n < n_out)[:, None] & (i_r < n_rank)[None, :]
        offsets = i_adapter * stride_adapter + i_n[:, None] * n_rank + i_r[None, :]
        b_up = tl.load(p_up + offsets, mask=inside, other=0.0)
        b_ds = tl.dot(b_dy, b_up, b_ds, input_precision="ieee")
        if p_dup is not None:
            b_dup = tl.dot(tl.trans(b_dy), b_s, input_precision="ieee")
            tl.atomic_add(p_dup + offsets, b_dup, mask=inside)
    inside = (i_m < n_rows)[:, None] & (i_r < n_rank)[None, :]
    p_own = p_ds + i_row[:, None] * stride_s + i_r[None, :]
    tl.store(p_own, b_ds.to(p_ds.dtype.element_ty), mask=inside)


@triton.jit
def k_through_down(
    p_x, p_ds, p_scale, p_ddown, p_index, p_seed,
    n_rows, n_in, n_rank, stride_adapter, least, keep_scale,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """``dA += (s dS)^T dropout(x)``."""
    i_sample = tl.program_id(2).to(tl.int64)
    ranks = tl.cdiv(n_rank, BR)
    i_k = tl.program_id(0) // ranks * BK + tl.arange(0, BK)
    i_r = tl.program_id(0) % ranks * BR + tl.arange(0, BR)
    i_adapter = _adapter(p_index, i_sample)
    b_ddown = tl.zeros((BR, BK), tl.float32)
    first = tl.program_id(1) * STEPS * BM
    for start in range(first, tl.minimum(first + STEPS * BM, n_rows), BM):
        i_m = start + tl.arange(0, BM)
        i_row = i_sample * n_rows + i_m
        inside = (i_m < n_rows)[:, None] & (i_k < n_in)[None, :]
        b_x = tl.load(p_x + i_row[:, None] * n_in + i_k[None, :], mask=inside, other=0.0)
        if p_seed is not None:
            b_x = tl.where(kept(p_seed, i_row, i_k, least), b_x, 0.0)
        b_ds = _thin(p_ds, p_scale, i_row, i_r, i_adapter, i_m < n_rows, n_rank, n_rank)
        b_ddown = tl.dot(tl.trans(b_ds), b_x, b_ddown, input_precision="ieee")
    if p_seed is not None:
        b_ddown *= keep_scale
    inside = (i_r < n_rank)[:, None] & (i_k < n_in)[None, :]
    p_own = p_ddown + i_adapter * stride_adapter + i_r[:, None] * n_in + i_k[None, :]
    tl.atomic_add(p_own, b_ddown, mask=inside)

"""The kernels of a bottleneck; ``triton.py`` says how they make one op."""

# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["k_forward", "k_through_down", "k_through_up"]


@triton.jit
def _cdf(b_h):
    return 0.5 * (1.0 + tl.erf(b_h * 0.7071067811865476))


@triton.jit
def _inner(b_h):
    """``tanh`` of the approximation of gelu."""
    return 2.0 * tl.sigmoid(1.5957691216057308 * (b_h + 0.044715 * b_h * b_h * b_h)) - 1.0


@triton.jit
def _phi(b_h, KIND: tl.constexpr):
    if KIND == "relu":
        b_z = tl.maximum(b_h, 0.0)
    elif KIND == "gelu":
        b_z = b_h * _cdf(b_h)
    elif KIND == "gelu_tanh":
        b_z = 0.5 * b_h * (1.0 + _inner(b_h))
    elif KIND == "silu":
        b_z = b_h * tl.sigmoid(b_h)
    elif KIND == "tanh":
        b_z = 2.0 * tl.sigmoid(2.0 * b_h) - 1.0
    elif KIND == "sigmoid":
        b_z = tl.sigmoid(b_h)
    else:
        b_z = b_h
    return b_z


@triton.jit
def _derivative(b_h, KIND: tl.constexpr):
    if KIND == "relu":
        b_d = tl.where(b_h > 0.0, 1.0, 0.0)
    elif KIND == "gelu":
        b_d = _cdf(b_h) + b_h * tl.exp(-0.5 * b_h * b_h) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        b_t = _inner(b_h)
        b_i = 0.7978845608028654 * (1.0 + 0.134145 * b_h * b_h)
        b_d = 0.5 * (1.0 + b_t) + 0.5 * b_h * (1.0 - b_t * b_t) * b_i
    elif KIND == "silu":
        b_s = tl.sigmoid(b_h)
        b_d = b_s * (1.0 + b_h * (1.0 - b_s))
    elif KIND == "tanh":
        b_t = 2.0 * tl.sigmoid(2.0 * b_h) - 1.0
        b_d = 1.0 - b_t * b_t
    elif KIND == "sigmoid":
        b_s = tl.sigmoid(b_h)
        b_d = b_s * (1.0 - b_s)
    else:
        b_d = tl.full(b_h.shape, 1.0, tl.float32)
    return b_d


@triton.jit
def k_forward(
    p_x, p_into, p_down, p_down_bias, p_up, p_up_bias, p_factor, p_hidden, p_y,
    n_rows, n_in, n_out, n_width, stride_factor,
    RESIDUAL: tl.constexpr, KIND: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A strip of rows: down, activation and up, the narrow side in registers."""
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_row = i_m.to(tl.int64)
    i_r = tl.arange(0, BR)
    row_inside, rank_inside = i_m < n_rows, i_r < n_width
    b_h = tl.zeros((BM, BR), tl.float32)
    for start in range(0, n_in, BK):
        i_k = start + tl.arange(0, BK)
        inside = row_inside[:, None] & (i_k < n_in)[None, :]
        b_x = tl.load(p_x + i_row[:, None] * n_in + i_k[None, :], mask=inside, other=0.0)
        inside = rank_inside[None, :] & (i_k < n_in)[:, None]
        b_w = tl.load(p_down + i_r[None, :] * n_in + i_k[:, None], mask=inside, other=0.0)
        b_h = tl.dot(b_x, b_w, b_h, input_precision="ieee")
    if p_down_bias is not None:
        b_h += tl.load(p_down_bias + i_r, mask=rank_inside, other=0.0)[None, :]
    b_h = b_h.to(p_hidden.dtype.element_ty)
    thin_inside = row_inside[:, None] & rank_inside[None, :]
    tl.store(p_hidden + i_row[:, None] * n_width + i_r[None, :], b_h, mask=thin_inside)
    b_factor = tl.load(p_factor + i_row * stride_factor, mask=row_inside, other=0.0)[:, None]
    b_z = (_phi(b_h.to(tl.float32), KIND) * b_factor).to(p_y.dtype.element_ty)
    for start in range(0, n_out, BK):
        i_n = start + tl.arange(0, BK)
        up_inside = rank_inside[:, None] & (i_n < n_out)[None, :]
        b_w = tl.load(p_up + i_n[None, :] * n_width + i_r[:, None], mask=up_inside, other=0.0)
        b_y = tl.dot(b_z, b_w, input_precision="ieee")
        if p_up_bias is not None:
            b_bias = tl.load(p_up_bias + i_n, mask=i_n < n_out, other=0.0)
            b_y += b_bias[None, :].to(tl.float32) * b_factor
        y_inside = row_inside[:, None] & (i_n < n_out)[None, :]
        offsets = i_row[:, None] * n_out + i_n[None, :]
        if p_into is not None:
            b_y += tl.load(p_into + offsets, mask=y_inside, other=0.0)
        if RESIDUAL:
            b_y += tl.load(p_x + offsets, mask=y_inside, other=0.0)
        tl.store(p_y + offsets, b_y.to(p_y.dtype.element_ty), mask=y_inside)


@triton.jit
def k_through_up(
    p_dy, p_hidden, p_up, p_up_bias, p_factor, p_dup, p_dup_bias, p_dh, p_dfactor,
    n_rows, n_out, n_width, stride_factor,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One read of ``dY``: ``dU``, the gradient of its bias, of the factor, and of ``D x + b_D``."""
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_row = i_m.to(tl.int64)
    i_r = tl.arange(0, BR)
    row_inside, rank_inside = i_m < n_rows, i_r < n_width
    thin_inside = row_inside[:, None] & rank_inside[None, :]
    thin = i_row[:, None] * n_width + i_r[None, :]
    b_factor = tl.load(p_factor + i_row * stride_factor, mask=row_inside, other=0.0)
    b_s = tl.load(p_hidden + thin, mask=thin_inside, other=0.0).to(tl.float32)
    b_s = (_phi(b_s, KIND) * b_factor[:, None]).to(p_dy.dtype.element_ty)
    b_dz = tl.zeros((BM, BR), tl.float32)
    b_dfactor = tl.zeros((BM,), tl.float32)
    count = tl.cdiv(n_out, BN)
    for step in range(count):
        # Programs begin at different columns, or all would add to one place at once.
        i_n = (step + tl.program_id(0)) % count * BN + tl.arange(0, BN)
        inside = row_inside[:, None] & (i_n < n_out)[None, :]
        b_dy = tl.load(p_dy + i_row[:, None] * n_out + i_n[None, :], mask=inside, other=0.0)
        inside = (i_n < n_out)[:, None] & rank_inside[None, :]
        offsets = i_n[:, None] * n_width + i_r[None, :]
        b_up = tl.load(p_up + offsets, mask=inside, other=0.0)
        b_dz = tl.dot(b_dy, b_up, b_dz, input_precision="ieee")
        if p_dup is not None:
            b_dup = tl.dot(tl.trans(b_dy), b_s, input_precision="ieee")
            tl.atomic_add(p_dup + offsets, b_dup, mask=inside)
        if p_up_bias is not None:
            b_wide = b_dy.to(tl.float32)
            b_bias = tl.load(p_up_bias + i_n, mask=i_n < n_out, other=0.0).to(tl.float32)
            b_dfactor += tl.sum(b_wide * b_bias[None, :], 1)
            if p_dup is not None:
                b_sum = tl.sum(b_wide * b_factor[:, None].to(tl.float32), 0)
                tl.atomic_add(p_dup_bias + i_n, b_sum, mask=i_n < n_out)
    # Read again: held through the loop it would take a third of the registers.
    b_h = tl.load(p_hidden + thin, mask=thin_inside, other=0.0).to(tl.float32)
    b_dfactor += tl.sum(b_dz * _phi(b_h, KIND), 1)
    tl.store(p_dfactor + i_row, b_dfactor, mask=row_inside)
    b_dh = b_dz * b_factor[:, None] * _derivative(b_h, KIND)
    tl.store(p_dh + thin, b_dh.to(p_dh.dtype.element_ty), mask=thin_inside)


@triton.jit
def k_through_down(
    p_dh, p_down, p_dy, p_dx, n_rows, n_in, n_width,
    RESIDUAL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``dX = dH D``, and ``dY`` where x itself was added."""
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_k = tl.program_id(1) * BK + tl.arange(0, BK)
    i_row = i_m.to(tl.int64)
    i_r = tl.arange(0, BR)
    inside = (i_m < n_rows)[:, None] & (i_r < n_width)[None, :]
    b_dh = tl.load(p_dh + i_row[:, None] * n_width + i_r[None, :], mask=inside, other=0.0)
    inside = (i_r < n_width)[:, None] & (i_k < n_in)[None, :]
    b_w = tl.load(p_down + i_r[:, None] * n_in + i_k[None, :], mask=inside, other=0.0)
    b_dx = tl.dot(b_dh, b_w, input_precision="ieee")
    inside = (i_m < n_rows)[:, None] & (i_k < n_in)[None, :]
    offsets = i_row[:, None] * n_in + i_k[None, :]
    if RESIDUAL:
        b_dx += tl.load(p_dy + offsets, mask=inside, other=0.0)
    tl.store(p_dx + offsets, b_dx.to(p_dx.dtype.element_ty), mask=inside)

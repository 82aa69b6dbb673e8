"""A bottleneck on a GPU, the narrow side in registers.

    k_forward       reads x (and the stream added to), writes h and y
    k_through_up    reads dY once: dU, d b_U, d factor, and dH through the activation
    k_through_down  writes dX; the sum with dY inside
    lora_linear's   dD = dH^T x

Wider ones than a tile's registers hold run as products of torch.
"""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from peftref.ops.bottleneck import cpu
from peftref.ops.bottleneck.triton_kernels import k_forward, k_through_down, k_through_up
from peftref.ops.lora_linear.triton import Call, Tile, through_down
from peftref.ops.tiles import HALVES, Variant, padded_rank, pointers

__all__ = ["backward", "forward", "variants"]

_WIDEST = 128
_TILE = Tile(64, 64, 64, 8, 2)
_WIDE = Tile(32, 32, 64, 8, 2)
"""Above a width of 64, where the other one spills registers."""


def _tile(width: int, given: Tile | None) -> Tile:
    return given or (_TILE if width <= 64 else _WIDE)


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
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, then ``D x + b_D`` (rows, b)."""
    width, n_in = down.shape
    if width > _WIDEST:
        return cpu.forward(
            x, into, down, down_bias, up, up_bias, scale, gate, activation, residual
        )
    rows = x.reshape(-1, n_in).contiguous()
    count, n_out, chosen = rows.shape[0], up.shape[0], _tile(width, tile)
    y, hidden = x.new_empty(*x.shape[:-1], n_out), x.new_empty(count, width)
    factor = _factor(x, scale, gate)
    k_forward[(triton.cdiv(count, chosen.rows),)](
        rows, None if into is None else into.contiguous(), down.to(x.dtype).contiguous(),
        down_bias, up.to(x.dtype).contiguous(), up_bias, factor, hidden, y,
        count, n_in, n_out, width, int(factor.numel() > 1), RESIDUAL=residual, KIND=activation,
        BM=chosen.rows, BK=chosen.depth, BR=padded_rank(width), num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip
    return y, hidden


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
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, down, its bias, up, its bias, scale and gate; empty if not wanted."""
    (width, n_in), rows = down.shape, hidden.shape[0]
    if width > _WIDEST:
        return cpu.backward(
            dy, x, hidden, down, up, up_bias, scale, gate, activation, residual, wanted
        )
    dh, of_factor, d_up, d_up_bias = _up(
        dy, hidden, up, up_bias, _factor(x, scale, gate), activation, tile, wanted
    )
    d_scale, d_gate = dy.new_empty(0), dy.new_empty(0)
    if wanted[5] or wanted[6]:
        d_scale, d_gate = cpu.through_factor(of_factor, x, scale, gate)
    d_x, d_down = dy.new_empty(0), dy.new_empty(0)
    chosen = _tile(width, tile)
    if wanted[0]:
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grid = (triton.cdiv(rows, chosen.rows), triton.cdiv(n_in, chosen.depth))
        k_through_down[grid](
            dh, down.to(dy.dtype).contiguous(), dy, d_x, rows, n_in, width, RESIDUAL=residual,
            BM=chosen.rows, BK=chosen.depth, BR=padded_rank(width), num_warps=chosen.warps,
        )  # fmt: skip
    if wanted[1]:
        ones = torch.ones(width, device=x.device)
        call = Call(1, rows, tile=tile)
        d_down = through_down(call, x.contiguous(), dh, ones, down[None].shape)[0]
        d_down = d_down.to(down.dtype, copy=True)
    d_bias = dh.sum(0) if wanted[2] else dy.new_empty(0)
    return d_x, d_down, d_bias, d_up, d_up_bias, d_scale, d_gate


def _up(
    dy: Tensor,
    hidden: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    factor: Tensor,
    activation: str,
    tile: Tile | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of hidden and of each row's factor, of up and its bias."""
    (n_out, width), rows = up.shape, hidden.shape[0]
    trains = wanted[3] or wanted[4]
    d_up = dy.new_zeros(up.shape, dtype=torch.float32) if trains else None
    has_bias = trains and up_bias is not None
    d_bias = dy.new_zeros(n_out, dtype=torch.float32) if has_bias else None
    dh, of_factor = torch.empty_like(hidden), dy.new_empty(rows, dtype=torch.float32)
    chosen = _tile(width, tile)
    k_through_up[(triton.cdiv(rows, chosen.rows),)](
        dy, hidden, up.to(dy.dtype).contiguous(), up_bias, factor, d_up, d_bias, dh, of_factor,
        rows, n_out, width, int(factor.numel() > 1), KIND=activation, BM=chosen.rows,
        BN=chosen.columns, BR=padded_rank(width), num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    none = dy.new_empty(0)
    own_up = none if d_up is None else d_up.to(up.dtype)
    own_bias = dy.new_empty(0) if d_bias is None or up_bias is None else d_bias.to(up_bias.dtype)
    return dh, of_factor, own_up, own_bias


def _factor(x: Tensor, scale: Tensor, gate: Tensor | None) -> Tensor:
    """Scale and gate in float32: one number, or one a row."""
    if gate is None:
        return scale.float().reshape(1)
    return (gate.float() * scale.float()).expand(*x.shape[:-1], 1).reshape(-1).contiguous()


def variants() -> Iterator[Variant]:
    """Every form of the kernels but for types of 16 bits and activations that cost the same."""
    for width in (16, 32, 64, 128):
        for kind in ("gelu", "gelu_tanh"):
            yield from _variants(width, kind, HALVES[0])
    yield from _variants(64, "relu", HALVES[1])


def _variants(width: int, kind: str, dtype: str) -> Iterator[Variant]:
    tile = _tile(width, None)
    names = ("p_x", "p_into", "p_down", "p_down_bias", "p_up", "p_up_bias", "p_hidden", "p_y",
             "p_dy", "p_dh", "p_dx")  # fmt: skip
    sizes = ("n_rows", "n_in", "n_out", "n_width", "stride_factor")
    signature = pointers(dtype, *names) | dict.fromkeys(sizes, "i32")
    signature |= dict.fromkeys(("p_factor", "p_dup", "p_dup_bias", "p_dfactor"), "*fp32")
    blocks: dict[str, int] = {"BM": tile.rows, "BK": tile.depth, "BN": tile.columns, "BR": width}
    for name, kernel, stages in (
        ("forward", k_forward, tile.stages),
        ("through up", k_through_up, tile.stages),
        ("through down", k_through_down, 3),
    ):
        yield Variant(
            f"bottleneck {name} {kind} width {width} {dtype}", kernel, signature,
            {**blocks, "RESIDUAL": True, "KIND": kind}, tile.warps, stages,
            unaligned=("n_width", "stride_factor"),
        )  # fmt: skip

"""Low-rank updates of frozen linears on a GPU.

The graph is cut at the thin ``H = dropout(x) A^T`` (rows, rank), as in LoRAFusion
(https://arxiv.org/abs/2510.00206), so that each wide tensor is read once:

    k_down          H = dropout(x) A^T                      one read of x
    k_product       y = x W^T + b + (s H) B^T               the update in the accumulator
    k_through_up    dB = dY^T (s H),  dS = dY B             one read of dY
    k_product       dX = dY W + keep * ((s dS) A)           the update in the accumulator
    k_through_down  dA = (s dS)^T dropout(x)                one read of x

Every kernel runs over samples, each of which has an adapter of its own, or all share one.
"""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from peftref.ops.lora_linear.triton_kernels import (
    k_down,
    k_product,
    k_through_down,
    k_through_up,
)
from peftref.ops.seed import threshold
from peftref.ops.tiles import HALVES, Variant, architecture, padded_rank, pointers

__all__ = [
    "Call",
    "Tile",
    "backward",
    "down",
    "forward",
    "product",
    "through_down",
    "through_up",
    "variants",
]


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, warps that share it, loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


PRODUCT = {
    80: Tile(128, 128, 32, 8, 4),
    90: Tile(128, 256, 64, 8, 3),
}
MASKED_PRODUCT = {80: Tile(128, 64, 32, 4, 3), 90: Tile(128, 128, 64, 8, 3)}
"""With dropout two accumulators are held."""
DOWN = {80: Tile(64, 0, 64, 4, 3), 90: Tile(64, 0, 128, 4, 3)}
THROUGH_UP = {80: Tile(64, 64, 0, 4, 2), 90: Tile(64, 128, 0, 8, 3)}
THROUGH_DOWN = {80: Tile(64, 64, 0, 4, 3), 90: Tile(64, 128, 0, 8, 3)}
_STEPS = 8  # tiles of rows that one program of `k_through_down` sums before it adds to memory


@dataclass(frozen=True, slots=True)
class Call:
    """What all kernels of one call share.

    Attributes:
        samples: how many blocks of ``rows`` rows the stream has; each has one adapter.
        index: which adapter (samples), or None: the sample's own number.
        tile: instead of the tables' (the interpreter, which is slow, takes small ones).
    """

    samples: int
    rows: int
    p: float = 0.0
    seed: Tensor | None = None
    index: Tensor | None = None
    tile: Tile | None = None

    def dropout(self) -> tuple[Tensor | None, int, float]:
        """Seed, threshold and scale of what stays."""
        if self.seed is None:
            return None, 0, 1.0
        return self.seed, threshold(self.p), 1 / (1 - self.p)

    def choose(self, table: dict[int, Tile], x: Tensor) -> Tile:
        """The tile of a kernel."""
        return self.tile or table[architecture(x)]


def down(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    """``dropout(x) A^T`` (rows, rank), of ``A`` (adapters, rank, d)."""
    rank, n_in = weight.shape[-2:]
    hidden = x.new_empty(call.samples * call.rows, rank)
    tile, block = call.choose(DOWN, x), _rank_block(rank)
    grid = (triton.cdiv(call.rows, tile.rows), call.samples, triton.cdiv(rank, block))
    seed, least, keep_scale = call.dropout()
    k_down[grid](
        x, weight, hidden, call.index, seed, call.rows, n_in, rank, rank * n_in, least, keep_scale,
        BM=tile.rows, BK=tile.depth, BR=block, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return hidden


def product(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    scale: Tensor,
    thin: Tensor,
) -> Tensor:
    """``x W^T + b + keep * (s S) L^T``, ``W`` (k, d), ``L`` (adapters, k, rank), of any strides."""
    (n_out, n_in), rank = weight.shape, thin.shape[-1]
    y = x.new_empty(call.samples * call.rows, n_out)
    tile = call.choose(PRODUCT if call.seed is None else MASKED_PRODUCT, x)
    grid = (triton.cdiv(call.rows, tile.rows) * triton.cdiv(n_out, tile.columns), call.samples)
    seed, least, keep_scale = call.dropout()
    k_product[grid](
        x, weight, bias, s, scale, thin, y, call.index, seed, call.rows, n_out, n_in, rank,
        *weight.stride(), s.stride(0), *thin.stride(), least, keep_scale,
        BM=tile.rows, BN=tile.columns, BK=tile.depth, BR=_rank_block(rank, x),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def through_up(
    call: Call, dy: Tensor, hidden: Tensor, scale: Tensor, up: Tensor, ds: Tensor, *, wanted: bool
) -> Tensor | None:
    """Fill ``ds`` with ``dY B``; return ``dY^T (s H)`` (adapters, k, rank) in float32."""
    n_out, rank = up.shape[-2:]
    d_up = torch.zeros(up.shape, dtype=torch.float32, device=up.device) if wanted else None
    tile, block = call.choose(THROUGH_UP, dy), _rank_block(rank)
    grid = (triton.cdiv(call.rows, tile.rows), call.samples, triton.cdiv(rank, block))
    k_through_up[grid](
        dy, hidden, scale, up, ds, d_up, call.index, call.rows, n_out, rank, hidden.stride(0),
        n_out * rank, BM=tile.rows, BN=tile.columns, BR=block,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return d_up


def through_down(call: Call, x: Tensor, ds: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """``(s dS)^T dropout(x)`` (adapters, rank, d) in float32."""
    d_down = torch.zeros(shape, dtype=torch.float32, device=x.device)
    rank, n_in = shape[-2:]
    tile, block = call.choose(THROUGH_DOWN, x), _rank_block(rank)
    grid = (
        triton.cdiv(n_in, tile.columns) * triton.cdiv(rank, block),
        triton.cdiv(call.rows, tile.rows * _STEPS),
        call.samples,
    )
    seed, least, keep_scale = call.dropout()
    k_through_down[grid](
        x, ds, scale, d_down, call.index, seed, call.rows, n_in, rank, rank * n_in, least,
        keep_scale, BM=tile.rows, BK=tile.columns, BR=block, STEPS=_STEPS,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return d_down


def _rank_block(rank: int, of_product: Tensor | None = None) -> int:
    """The part of the rank that a tile takes; 64 beside a product spill registers before sm_90."""
    narrow = of_product is not None and architecture(of_product) < 90
    return min(32 if narrow else 64, padded_rank(rank))


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[Tensor],
    p: float,
    seed: Tensor | None,
    tile: Tile | None = None,
) -> list[Tensor]:
    """The outputs, then ``dropout(x) A^T`` of all targets (rows, sum of ranks)."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    call = Call(1, flat.shape[0], p, seed, tile=tile)
    hidden = down(call, flat, _stacked(downs, x.dtype)[None])
    unmasked = replace(call, seed=None)
    outputs: list[Tensor] = []
    start = 0
    for i, (weight, up) in enumerate(zip(weights, ups, strict=True)):
        rank = up.shape[1]
        part, scale = hidden[:, start : start + rank], _vector(scales[i], rank)
        bias = biases[i] if biases else None
        y = product(unmasked, flat, weight, bias, part, scale, up.to(x.dtype)[None])
        outputs.append(y.view(*x.shape[:-1], -1))
        start += rank
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
    tile: Tile | None = None,
) -> list[Tensor]:
    """The gradients of x, each bias, down, up and scale; empty where ``wanted`` says no."""
    flat = [dy.reshape(-1, dy.shape[-1]).contiguous() for dy in gradients]
    call = Call(1, hidden.shape[0], p, seed, tile=tile)
    ranks = [down.shape[0] for down in downs]
    vectors = [_vector(scale, rank) for scale, rank in zip(scales, ranks, strict=True)]
    ds = torch.empty_like(hidden)
    d_ups: list[Tensor] = []
    parts = zip(flat, hidden.split(ranks, 1), vectors, ups, ds.split(ranks, 1), strict=True)
    for dy, part, vector, up, into in parts:
        own = up.to(dy.dtype)[None]
        d_up = through_up(call, dy, part, vector, own, into, wanted=wanted[3])
        d_ups.append(dy.new_empty(0) if d_up is None else d_up[0].to(up.dtype))
    d_x, scale = hidden.new_empty(0), torch.cat(vectors)
    stacked = _stacked(downs, hidden.dtype)
    if wanted[0]:
        d_x = product(call, flat[0], weights[0].t(), None, ds, scale, stacked.t()[None])
        for dy, weight in zip(flat[1:], weights[1:], strict=True):
            d_x.addmm_(dy, weight)
        d_x = d_x.view(*gradients[0].shape[:-1], -1)
    d_downs = [hidden.new_empty(0) for _ in downs]
    if wanted[2] and x is not None:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        d_down = through_down(call, rows, ds, scale, stacked[None].shape)[0].split(ranks)
        d_downs = [d.to(down.dtype, copy=True) for d, down in zip(d_down, downs, strict=True)]
    d_biases = [dy.sum(0) if wanted[1] else dy.new_empty(0) for dy in flat]
    d_scales = _through_scales(hidden, ds, scales, ranks, wanted=wanted[4])
    return [d_x, *d_biases, *d_downs, *d_ups, *d_scales]


def _through_scales(
    hidden: Tensor, ds: Tensor, scales: list[Tensor], ranks: list[int], *, wanted: bool
) -> list[Tensor]:
    if not wanted:
        return [hidden.new_empty(0) for _ in scales]
    sums = (hidden.float() * ds).sum(0).split(ranks)
    return [
        (each.clone() if scale.dim() else each.sum()).to(scale.dtype)
        for each, scale in zip(sums, scales, strict=True)
    ]


def _stacked(downs: list[Tensor], dtype: torch.dtype) -> Tensor:
    return (downs[0] if len(downs) == 1 else torch.cat(downs)).to(dtype).contiguous()


def _vector(scale: Tensor, rank: int) -> Tensor:
    """A scale as one float32 number a rank."""
    return scale.float().expand(rank).contiguous()


def variants() -> Iterator[Variant]:
    """Every form of the kernels that a launch can ask for, but for types and widths of ranks.

    Ranks above 16 are compiled for bfloat16 only, as types of 16 bits differ in one instruction.
    """
    for dtype in HALVES:
        for rank in (16, 32, 64) if dtype == "bf16" else (16,):
            for sm in (80, 90):
                yield from _variants(dtype, rank, sm)


def _variants(dtype: str, rank: int, sm: int) -> Iterator[Variant]:
    sizes = ("n_rows", "n_out", "n_in", "n_rank", "stride_adapter", "stride_s", "least")
    strides = ("stride_wn", "stride_wk", "stride_ln", "stride_lr")
    signature = pointers(dtype, "p_x", "p_w", "p_bias", "p_s", "p_l", "p_y", "p_down", "p_hidden",
                         "p_dy", "p_up", "p_ds")  # fmt: skip
    signature |= dict.fromkeys(("p_scale", "p_dup", "p_ddown"), "*fp32")
    signature |= {"p_seed": "*i32", "keep_scale": "fp32"} | dict.fromkeys((*sizes, *strides), "i32")

    def form(name: str, kernel: object, tile: Tile, sizes: str, absent: str) -> Variant:
        values: dict[str, int] = tile._asdict()
        constants: dict[str, int | None] = {
            constant: values[of] for constant, of in (pair.split("=") for pair in sizes.split())
        }
        for each in absent.split():
            constants[each] = 1 if each.startswith("stride") else None
        if kernel is k_through_down:
            constants["STEPS"] = _STEPS
        block = min(rank, 32) if kernel is k_product and sm < 90 else rank
        return Variant(
            f"lora_linear {name} rank {rank} {dtype}", kernel,
            {k: v for k, v in signature.items() if k not in constants},
            {**constants, "BR": block}, tile.warps, tile.stages, (sm,),
            unaligned=("least", "n_rank", "stride_s"),
        )  # fmt: skip

    yield form("down", k_down, DOWN[sm], "BM=rows BK=depth", "p_index p_seed")
    yield form("down, dropout", k_down, DOWN[sm], "BM=rows BK=depth", "p_index")
    tile = "BM=rows BN=columns BK=depth"
    absent = "p_index p_seed stride_wk stride_lr"
    yield form("forward", k_product, PRODUCT[sm], tile, absent)
    absent = "p_index p_bias p_seed stride_wn stride_ln"
    yield form("backward", k_product, PRODUCT[sm], tile, absent)
    absent = "p_index p_bias stride_wn stride_ln"
    yield form("backward, dropout", k_product, MASKED_PRODUCT[sm], tile, absent)
    yield form("through up", k_through_up, THROUGH_UP[sm], "BM=rows BN=columns", "p_index")
    tile = "BM=rows BK=columns"
    yield form("through down", k_through_down, THROUGH_DOWN[sm], tile, "p_index p_seed")
    yield form("through down, dropout", k_through_down, THROUGH_DOWN[sm], tile, "p_index")

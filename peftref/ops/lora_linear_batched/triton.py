"""An adapter for each sample on a GPU: the kernels of ``lora_linear`` look theirs up."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from peftref.ops.lora_linear import triton as shared
from peftref.ops.lora_linear.triton import Call, Tile
from peftref.ops.tiles import Variant

__all__ = ["backward", "forward", "variants"]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, then ``A x`` (N, rows, rank)."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1]).contiguous()
    call = Call(rows.shape[0], rows.shape[1], index=index, tile=tile)
    hidden = shared.down(call, rows, down.to(x.dtype).contiguous())
    vector = _vectors(scale, down.shape[1])
    y = shared.product(call, rows, weight, bias, hidden, vector, up.to(x.dtype).contiguous())
    return y.view(*x.shape[:-1], -1), hidden.view(*rows.shape[:2], -1)


def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
    wanted: list[bool],
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, bias, down, up and scale; empty where ``wanted`` says no."""
    d_x, d_bias, d_down, d_up, d_scale = (hidden.new_empty(0) for _ in range(5))
    samples, rows, rank = hidden.shape
    call = Call(samples, rows, index=index, tile=tile)
    flat, vector = hidden.view(-1, rank), _vectors(scale, rank)
    narrow_up, narrow_down = (t.to(dy.dtype).contiguous() for t in (up, down))
    ds = torch.empty_like(flat)
    of_up = shared.through_up(call, dy, flat, vector, narrow_up, ds, wanted=wanted[3])
    if of_up is not None:
        d_up = of_up.to(up.dtype)
    if wanted[0]:
        d_x = shared.product(call, dy, weight.t(), None, ds, vector, narrow_down.mT)
        d_x = d_x.view(*dy.shape[:-1], -1)
    if wanted[1]:
        d_bias = dy.reshape(-1, dy.shape[-1]).sum(0)
    if wanted[2]:
        d_down = shared.through_down(call, x.contiguous(), ds, vector, down.shape).to(down.dtype)
    if wanted[4]:
        each = (flat.float() * ds).view(samples, -1).sum(1)
        d_scale = each if index is None else each.new_zeros(scale.shape).index_add_(0, index, each)
        d_scale = d_scale.to(scale.dtype)
    return d_x, d_bias, d_down, d_up, d_scale


def _vectors(scale: Tensor, rank: int) -> Tensor:
    """One float32 number for each adapter and rank."""
    return scale.float()[:, None].expand(-1, rank).contiguous()


def variants() -> Iterator[Variant]:
    """The kernels of ``lora_linear`` with an index."""
    for variant in shared.variants():
        if "rank 16 bf16" in variant.name and "dropout" not in variant.name:
            constants = {k: v for k, v in variant.constants.items() if k != "p_index"}
            signature = variant.signature | {"p_index": "*i64"}
            name = variant.name.replace("lora_linear", "lora_linear_batched")
            yield replace(variant, name=name, constants=constants, signature=signature)

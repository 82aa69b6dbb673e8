"""Causal attention beside a prefix on a GPU: torch's flash kernels, and a pass that joins them."""

# pyright: reportMissingParameterType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftref.ops.tiles import HALVES, Variant, pointers

__all__ = ["backward", "forward", "joined", "variants"]

_ROWS = 32


@triton.jit
def _join(
    p_out, p_beside, p_total, p_part, n_rows, n_tokens, n_heads, n_width,
    BR: tl.constexpr, WIDTH: tl.constexpr,
):
    """``out`` and ``total`` in place; rows (batch, token, head), sums (batch, head, token)."""
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    i_width = tl.arange(0, WIDTH)
    inside = i_rows < n_rows
    i_head = i_rows % n_heads
    i_token = (i_rows // n_heads) % n_tokens
    i_sums = (i_rows // (n_heads * n_tokens) * n_heads + i_head) * n_tokens + i_token
    b_total = tl.load(p_total + i_sums, mask=inside, other=0.0)
    b_part = tl.load(p_part + i_sums, mask=inside, other=0.0)
    b_top = tl.maximum(b_total, b_part)
    b_joined = b_top + tl.log(tl.exp(b_total - b_top) + tl.exp(b_part - b_top))
    places = i_rows.to(tl.int64)[:, None] * n_width + i_width[None, :]
    held = inside[:, None] & (i_width < n_width)[None, :]
    b_out = tl.load(p_out + places, mask=held, other=0.0).to(tl.float32)
    b_beside = tl.load(p_beside + places, mask=held, other=0.0).to(tl.float32)
    b_out = b_out * tl.exp(b_total - b_joined)[:, None]
    b_out += b_beside * tl.exp(b_part - b_joined)[:, None]
    tl.store(p_out + places, b_out.to(p_out.dtype.element_ty), mask=held)
    tl.store(p_total + i_sums, b_joined, mask=inside)


def joined(out: Tensor, total: Tensor, beside: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Two blocks as one: outputs (batch, heads, tokens, width), sums (batch, heads, tokens)."""
    batch, heads, tokens, width = out.shape
    # Rows as flash kernels write them, so that as a rule nothing is copied.
    rows, others = (t.transpose(1, 2).contiguous() for t in (out, beside))
    total = total.contiguous()
    count = batch * heads * tokens
    _join[triton.cdiv(count, _ROWS),](
        rows, others, total, part.contiguous(), count, tokens, heads, width,
        BR=_ROWS, WIDTH=triton.next_power_of_2(width), num_warps=4,
    )
    return rows.transpose(1, 2), total


def forward(
    query: Tensor,
    prefix_key: Tensor,
    key: Tensor,
    prefix_value: Tensor,
    value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of the sum of all exponentials (batch, heads, tokens)."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001
    prefix = [t.expand(query.shape[0], -1, -1, -1) for t in (prefix_key, prefix_value)]
    own = attend(query, key, value, 0.0, True, scale=scale)
    beside = attend(query, *prefix, 0.0, False, scale=scale)
    out, total = joined(own[0], own[1], beside[0], beside[1])
    return torch.empty_like(query).copy_(out) if out.stride() != query.stride() else out, total


def backward(
    gradient: Tensor,
    out: Tensor,
    joined: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    key: Tensor,
    prefix_value: Tensor,
    value: Tensor,
    scale: float,
) -> list[Tensor]:
    """The gradients of the five tensors, in their order."""
    keys, values = (t.expand(query.shape[0], -1, -1, -1) for t in (prefix_key, prefix_value))
    d_query, d_key, d_value = _through(gradient, (query, key, value), out, joined, scale, True)
    d_beside, d_prefix_key, d_prefix_value = _through(
        gradient, (query, keys, values), out, joined, scale, False
    )
    d_query += d_beside
    if prefix_key.shape[0] < query.shape[0]:
        d_prefix_key, d_prefix_value = (d.sum(0, True) for d in (d_prefix_key, d_prefix_value))
    found = (d_query, d_prefix_key, d_key, d_prefix_value, d_value)
    like = (query, prefix_key, key, prefix_value, value)
    return [torch.empty_like(t).copy_(d) for d, t in zip(found, like, strict=True)]


def _through(
    gradient: Tensor,
    block: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    joined: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the flash kernel gives for one block, as if all had been its own output."""
    query, key, _ = block
    # Without dropout the state of the generator is not read, and rows of one length need no table.
    state = torch.empty(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # noqa: SLF001
        gradient, *block, out, joined, None, None, query.shape[2], key.shape[2], 0.0, causal,
        state, unused, scale=scale,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    """The widths that a launch can ask for, in 16 bits."""
    sizes = dict.fromkeys(("n_rows", "n_tokens", "n_heads", "n_width"), "i32")
    for dtype in HALVES:
        for width in (32, 64, 128, 256):
            yield Variant(
                f"prefix_attention join {dtype} width={width}",
                _join,
                pointers(dtype, "p_out", "p_beside") | pointers("fp32", "p_total", "p_part")
                | sizes,
                {"BR": _ROWS, "WIDTH": width},
                unaligned=("n_rows", "n_tokens", "n_heads"),
            )

"""Attention over prefix rows and a sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.choice import has_triton
from peftref.ops.operator import Kernels, Operator, Rule, Saved
from peftref.ops.prefix_attention import cpu, reference

__all__ = ["OPERATOR", "prefix_attention"]


def prefix_attention(
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention of ``query`` over prefix rows, which every query sees, and the sequence.

    Causal attention without a mask runs as two blocks where torch has a fused kernel that gives
    the sums of the softmax; everything else is one block of prefix and sequence side by side, which
    is faster with a mask.

    Args:
        query: (batch, heads, queries, width).
        keys: of the prefix (batch or 1, key heads, p, width) and of the sequence (batch, key
            heads, tokens, width). Heads are a multiple of key heads.
        values: likewise.
        mask: over the sequence, broadcast to (batch, heads, queries, tokens): boolean, true where
            seen, or added to the scores.
        scale: of the scores; ``width ** -0.5`` by default.
        causal: query i sees tokens up to i, counted from the first; not together with a mask.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if causal and mask is None and _has_kernel(query):
        dtype = query.dtype
        return OPERATOR(
            query, keys[0].to(dtype), keys[1].to(dtype), values[0].to(dtype), values[1].to(dtype),
            scale,
        )  # fmt: skip
    rows, queries = keys[0].shape[2], query.shape[2]
    if mask is None and causal:
        seen = torch.ones(queries, rows + keys[1].shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril(rows)
    elif mask is not None:
        seen = True if mask.dtype == torch.bool else 0.0
        mask = torch.nn.functional.pad(mask, (rows, 0), value=seen)
    key, value = (
        torch.cat((prefix.to(own.dtype).expand(own.shape[0], -1, -1, -1), own), 2)
        for prefix, own in (keys, values)
    )
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _has_kernel(query: Tensor) -> bool:
    if query.device.type != "cuda":
        return query.device.type == "cpu"
    width = query.shape[-1]
    return query.dtype.itemsize == 2 and width % 8 == 0 and width <= 256 and has_triton()


def _fake_forward(
    query: Tensor,
    prefix_key: Tensor,
    key: Tensor,
    prefix_value: Tensor,
    value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=dtype)


def _fake_backward(
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
    prefix = [t.new_empty(t.shape) for t in (prefix_key, prefix_value)]
    like = [torch.empty_like(t) for t in (query, key, value)]
    return [like[0], prefix[0], like[1], prefix[1], like[2]]


def _save(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float],
    results: tuple[Tensor, Tensor],
) -> Saved:
    *tensors, scale = arguments
    return Saved((*results, *tensors), (scale,))


def _gradients(
    needs: tuple[bool, ...],
    saved: Saved,
    gradients: tuple[Tensor, ...],
    backward: Callable[..., list[Tensor]],
) -> list[Tensor | None]:
    gradient = gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
    found = backward(gradient, *saved.tensors, *saved.constants)
    return [g if need else None for g, need in zip(found, needs[:5], strict=True)] + [None]


OPERATOR: Operator[Tensor] = Operator(
    "prefix_attention",
    reference=reference.prefix_attention,
    kernels=Kernels(cpu.forward, cpu.backward),
    fake=Kernels(_fake_forward, _fake_backward),
    rule=Rule(_save, _gradients, hidden=1),
)

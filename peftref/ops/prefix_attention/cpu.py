"""Causal attention beside a prefix: two blocks, each by torch's fused kernel, joined by their sums.

With ``L = log(exp L_1 + exp L_2)`` of the two blocks, ``O = exp(L_1 - L) O_1 + exp(L_2 - L) O_2``.
The gradient of a block is what the kernel gives for that block alone, were ``O`` and ``L`` its own.
The causal block so keeps the kernel's causal form, which skips half of the scores; beside a prefix
in one block it would need a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["backward", "forward"]


def forward(
    query: Tensor,
    prefix_key: Tensor,
    key: Tensor,
    prefix_value: Tensor,
    value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and ``L`` (batch, heads, tokens) for the backward pass."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    prefix = [t.expand(query.shape[0], -1, -1, -1) for t in (prefix_key, prefix_value)]
    out, total = attend(query, key, value, 0.0, True, scale=scale)
    beside, part = attend(query, *prefix, 0.0, False, scale=scale)
    joined = torch.logaddexp(total, part)
    # In place, so that the result is laid out as the kernel's, which is the query's way.
    out.mul_((total - joined).exp_()[..., None])
    out.addcmul_(beside, (part - joined).exp_()[..., None].to(out.dtype))
    return out, joined.contiguous()


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
    through = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
    prefix = [t.expand(query.shape[0], -1, -1, -1) for t in (prefix_key, prefix_value)]
    rest = (out, joined, 0.0)
    d_query, d_key, d_value = through(gradient, query, key, value, *rest, True, scale=scale)
    d_beside, d_prefix_key, d_prefix_value = through(
        gradient, query, *prefix, *rest, False, scale=scale
    )
    d_query += d_beside
    if prefix_key.shape[0] < query.shape[0]:
        d_prefix_key, d_prefix_value = (d.sum(0, True) for d in (d_prefix_key, d_prefix_value))
    return [d_query, d_prefix_key.contiguous(), d_key, d_prefix_value.contiguous(), d_value]

"""Attention over prefix rows and the sequence, laid side by side."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["prefix_attention"]


def prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    key: Tensor,
    prefix_value: Tensor,
    value: Tensor,
    scale: float,
) -> Tensor:
    """Return causal attention of ``query`` over prefix rows, which all see, and the sequence.

    Prefix tuning, Li and Liang 2021, https://arxiv.org/abs/2101.00190

    Args:
        query: (batch, heads, tokens, width); token i sees tokens up to i.
        prefix_key: (batch or 1, key heads, p, width).
        key: (batch, key heads, tokens, width); heads are a multiple of key heads.
        prefix_value: like ``prefix_key``.
        value: like ``key``.
        scale: of the scores.
    """
    batch, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    keys = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], 2).repeat_interleave(groups, 1)
    values = torch.cat([prefix_value.expand(batch, -1, -1, -1), value], 2)
    rows = prefix_key.shape[2]
    seen = torch.ones(tokens, rows + tokens, dtype=torch.bool, device=query.device).tril(rows)
    scores = (query @ keys.mT * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ values.repeat_interleave(groups, 1)

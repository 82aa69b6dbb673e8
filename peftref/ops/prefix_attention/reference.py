"""Attention over prefix rows and the sequence, laid side by side."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["prefix_attention"]


def prefix_attention(
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Return attention of ``query`` over the prefix rows, which all see, and the sequence.

    Prefix tuning, Li and Liang 2021, https://arxiv.org/abs/2101.00190

    Args:
        query: (batch, heads, queries, width).
        keys: of the prefix (batch or 1, key heads, p, width) and of the sequence (batch, key
            heads, tokens, width). Heads are a multiple of key heads.
        values: likewise.
        mask: over the sequence, broadcast to (batch, heads, queries, tokens): boolean, true where
            seen, or added to the scores.
        scale: of the scores; ``width ** -0.5`` by default.
        causal: query i sees tokens up to i (aligned at the first, as torch does).
    """
    batch, heads, queries, width = query.shape
    key = torch.cat([keys[0].expand(batch, -1, -1, -1), keys[1]], 2)
    value = torch.cat([values[0].expand(batch, -1, -1, -1), values[1]], 2)
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (width**-0.5 if scale is None else scale)
    rows, tokens = keys[0].shape[2], keys[1].shape[2]
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=query.device)
    seen = seen.tril() if causal else seen
    bias = torch.zeros_like(scores[..., rows:])
    if mask is not None:
        seen, bias = (seen & mask, bias) if mask.dtype == torch.bool else (seen, bias + mask)
    bias = bias.masked_fill(~seen, -torch.inf)
    return (scores + torch.nn.functional.pad(bias, (rows, 0))).softmax(-1) @ value

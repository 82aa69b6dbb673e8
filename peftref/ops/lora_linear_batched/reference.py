"""The definition of several low-rank updates of one frozen linear."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["lora_linear_batched"]


def lora_linear_batched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    index: Tensor | None,
) -> Tensor:
    """``y_n = W x_n + b + B_i (s_i * A_i x_n)`` with ``i = index_n``.

    Args:
        x: (N, ..., d).
        weight: (k, d).
        bias: (k).
        down: ``A`` (K, r, d).
        up: ``B`` (K, k, r).
        scale: ``s`` (K).
        index: (N) integers below K, or None: sample n has adapter n.
    """
    if index is not None:
        down, up, scale = (t.index_select(0, index) for t in (down, up, scale))
    rows = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
    hidden = torch.einsum("nmd,nrd->nmr", rows, down.to(x.dtype))
    hidden = hidden * scale.to(x.dtype)[:, None, None]
    update = torch.einsum("nmr,nkr->nmk", hidden, up.to(x.dtype))
    y = linear(x, weight, bias)
    return y + update.view(y.shape)

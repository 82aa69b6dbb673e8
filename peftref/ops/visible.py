"""Which token sees which in a small attention beside the backbone's own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["visible"]


def visible(padding: Tensor | None, x: Tensor, *, causal: bool) -> Tensor | None:
    """Return which token sees which, (batch or 1, 1, tokens, tokens); None: each sees all.

    A padding token sees itself, so that no row of the softmax is empty.
    """
    n = x.shape[-2]
    if padding is None and not causal:
        return None
    seen = torch.ones(n, n, dtype=torch.bool, device=x.device)
    seen = (seen.tril() if causal else seen)[None, None]
    if padding is None:
        return seen
    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    return (seen & padding.bool()[:, None, None, :]) | itself

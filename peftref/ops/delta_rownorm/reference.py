"""Row norms of a weight with a low-rank addition, the sum formed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["delta_rownorm"]


def delta_rownorm(weight: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """Return ``||W + s B A||`` of every row (d_out,), in float32 or wider; no gradient.

    Args:
        weight: ``W`` (d_out, d_in).
        down: ``A`` (r, d_in).
        up: ``B`` (d_out, r).
        scale: ``s``, of one element.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        formed = weight.to(wide) + scale.to(wide) * (up.to(wide) @ down.to(wide))
        return formed.norm(dim=1)

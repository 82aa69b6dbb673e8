"""What autocast asks of an op's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast"]

def autocast(x: Tensor, *frozen: list[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    """Return the stream and lists of frozen tensors in autocast's type, where autocast is on.

    Trained tensors stay as they are: the kernels round them, and keep their gradients wide.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, list(frozen)
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), [[t.to(dtype) for t in each] for each in frozen]

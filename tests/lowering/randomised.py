"""Adapters away from their start: at the start most edits are zero and hide each other."""

from __future__ import annotations

import torch

from peftref.adapted import Adapted

__all__ = ["randomise"]


def randomise(adapted: Adapted, seed: int = 0, size: float = 0.2) -> Adapted:
    """Add noise to every trained tensor; masks and frozen tensors stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(adapted.trainable.items()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_((size * noise).to(tensor.dtype))
    return adapted

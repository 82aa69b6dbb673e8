"""Masks with real scores that are trained: binary forwards, gradients as if the mask were real."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OPEN", "expected_open", "hard_concrete", "threshold", "top_k"]

LOW, HIGH, TEMPERATURE = -1.5, 1.5, 1.0
OPEN = 30.0
"""A score at which a hard-concrete gate is one, whatever is drawn in float32."""


def top_k(scores: Tensor, keep: float) -> Tensor:
    """One at the ``keep`` share of entries with the highest scores, zero elsewhere."""
    import torch

    flat = scores.detach().flatten()
    count = max(1, round(keep * flat.numel()))
    mask = torch.zeros_like(flat)
    mask[flat.topk(count).indices] = 1
    return _through(mask.view_as(scores), scores)


def threshold(scores: Tensor, least: float) -> Tensor:
    """One where the score is ``least`` or more, zero elsewhere."""
    return _through((scores.detach() >= least).to(scores.dtype), scores)


def _through(mask: Tensor, scores: Tensor) -> Tensor:
    """The mask, with the gradient handed to the scores as it is (Bengio et al. 2013).

    Added so that the value is the mask exactly: the difference of equal numbers is zero.
    """
    return mask + (scores - scores.detach())


def hard_concrete(scores: Tensor, *, draw: bool) -> Tensor:
    """Gates in [0, 1]: ``clip(s (h - l) + l)``, ``s = sigmoid((logit u + scores) / t)``.

    Without ``draw`` the noise is left out. Louizos et al. 2018, https://arxiv.org/abs/1712.01312
    """
    import torch

    noise = 0.0
    if draw:
        u = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
        noise = u.log() - (1 - u).log()
    gate = torch.sigmoid((scores + noise) / TEMPERATURE)
    return (gate * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_open(scores: Tensor) -> Tensor:
    """The expected number of gates that are not zero: the differentiable L0 norm."""
    import torch

    return torch.sigmoid(scores - TEMPERATURE * math.log(-LOW / HIGH)).sum()

"""Quantise and dequantise: the values that a weight has once it is stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peftref.ops.matrix_parts import leading_svd

__all__ = ["NF4", "Grid", "alternate", "rounded"]

# Quantiles of a normal distribution, scaled to one (QLoRA, Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)


@dataclass(frozen=True, slots=True)
class Grid:
    """Which values there are.

    Attributes:
        kind: ``nf4``: 16 quantiles of a normal distribution times the block's largest magnitude,
            blocks over the rows laid end to end. ``int``: ``2^bits`` equal steps from the
            smallest to the largest value of a block, blocks along each row (a scale and a
            floating-point zero point).
        bits: of a code; 4 for nf4.
        block: entries that share a scale.
    """

    kind: Literal["nf4", "int"] = "nf4"
    bits: int = 4
    block: int = 64


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """``dequantise(quantise(W))``; scales are not quantised themselves."""
    if grid.kind == "int":
        parts = weight.unflatten(1, (-1, grid.block))
        low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
        step = (high - low) / (2**grid.bits - 1)
        step = torch.where(step > 0, step, torch.ones_like(step))
        return (low + step * ((parts - low) / step).round()).flatten(1)
    flat = weight.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % grid.block))
    parts = padded.unflatten(0, (-1, grid.block))
    scale = parts.abs().amax(-1, keepdim=True)
    codes = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
    unit = parts / torch.where(scale > 0, scale, torch.ones_like(scale))
    nearest = torch.bucketize(unit, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).flatten()[: flat.numel()].view_as(weight)


def alternate(
    weight: Tensor, grid: Grid, rank: int, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``Q``, ``B``, ``A`` with ``Q + B A`` near ``W``.

    ``rounds`` times ``Q = rounded(W - B A)``, then ``B A`` the best approximation of ``W - Q`` of
    that rank; ``B A`` is zero at first. LoftQ, Li et al. 2023, https://arxiv.org/abs/2310.08659
    """
    up, down = weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1])
    base = weight
    for _ in range(rounds):
        base = rounded(weight - up @ down, grid)
        u, s, vt = leading_svd(weight - base, rank)
        up, down = u * s.sqrt(), s.sqrt()[:, None] * vt
    return base, up, down

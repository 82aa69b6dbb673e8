"""The tree of 2x2 maps as two small sets of matrices, and back.

The rounds that stay within blocks of ``b`` coordinates, a power of two, make a matrix a block. All
later rounds are on the first coordinates of the blocks, and make one matrix of those. So a stream
is multiplied twice, and not once a round, and nothing of a round is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftref.ops.sums import wide

__all__ = ["Tree"]

_BLOCK = 32


class Tree:
    """The matrices of the planes (d - 1, 2, 2).

    Attributes:
        block: ``b``.
    """

    def __init__(self, planes: Tensor) -> None:
        width = planes.shape[0] + 1
        self.block = min(_BLOCK, 1 << (width.bit_length() - 1))
        count = -(-width // self.block)
        eye = torch.eye(2, dtype=wide(planes), device=planes.device)
        # The first coordinate is never the second of a pair, and padding is left alone.
        full = eye.repeat(count * self.block, 1, 1)
        full[1:width] = planes
        self._inner = full.unflatten(0, (count, self.block))
        self._outer = self._inner[:, 0][None]
        self._within = _rounds(self._inner)
        self._across = _rounds(self._outer)
        self._width = width

    @property
    def within(self) -> Tensor:
        """(n, b, b), for blocks of coordinates; of the last one, what lies inside ``d``."""
        return self._within[-1]

    @property
    def across(self) -> Tensor:
        """(n, n), for the first coordinate of each block."""
        return self._across[-1][0]

    def gradient(self, d_within: Tensor, d_across: Tensor) -> Tensor:
        """The gradient of the planes from those of the matrices."""
        found = _through_rounds(d_within.to(self._inner), self._inner, self._within)
        found[:, 0] += _through_rounds(d_across[None].to(self._outer), self._outer, self._across)[0]
        return found.flatten(0, 1)[1 : self._width]


def _pairs(width: int) -> Iterator[tuple[slice, slice]]:
    """First and second coordinates of each round."""
    step = 1
    while step < width:
        yield slice(0, width - step, 2 * step), slice(step, width, 2 * step)
        step *= 2


def _rounds(planes: Tensor) -> list[Tensor]:
    """The product up to each round (m, w, w), the identity first."""
    count, width = planes.shape[:2]
    eye = torch.eye(width, dtype=planes.dtype, device=planes.device)
    states = [eye.expand(count, -1, -1)]
    for first, second in _pairs(width):
        before, after = states[-1], states[-1].clone()
        plane = planes[:, None, second]
        a, b = before[..., first], before[..., second]
        after[..., first] = a * plane[..., 0, 0] + b * plane[..., 1, 0]
        after[..., second] = a * plane[..., 0, 1] + b * plane[..., 1, 1]
        states.append(after)
    return states


def _through_rounds(gradient: Tensor, planes: Tensor, states: list[Tensor]) -> Tensor:
    """The gradient of the planes from that of the last state."""
    found = torch.zeros_like(planes)
    gradient = gradient.clone()
    rounds = list(zip(_pairs(planes.shape[1]), states, strict=False))
    for (first, second), before in reversed(rounds):
        plane = planes[:, None, second]
        pair = (before[..., first], before[..., second])
        d_first, d_second = gradient[..., first].clone(), gradient[..., second].clone()
        for row, own in enumerate(pair):
            found[:, second, row, 0] = (own * d_first).sum(1)
            found[:, second, row, 1] = (own * d_second).sum(1)
        gradient[..., first] = d_first * plane[..., 0, 0] + d_second * plane[..., 0, 1]
        gradient[..., second] = d_first * plane[..., 1, 0] + d_second * plane[..., 1, 1]
    return found

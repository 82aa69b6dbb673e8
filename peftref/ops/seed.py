"""Dropout without a stored mask: which entries stay follows from a seed and their place.

For entry (i, 2j) the low, for (i, 2j + 1) the high 16 bits, as a signed number, of

    C (a ^ a >> 15),   a = u(i) u(-1 - j)                 all in 32 bits, shifts arithmetic

stay when they are at least ``round(65536 p) - 32768``; ``u`` hashes the seed and a number to an odd
one. The hash of a number is paid once a row and once a column; four operations a pair of entries
remain, which any vector unit has, and which a GPU repeats in a register.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["C1", "C2", "blocks", "draw_seed", "hashed", "keep", "threshold"]

_BLOCK = 98304  # entries: a block and its random words stay in a core's second cache

C1 = 0x7FEB352D
C2 = -0x7B935975
"""Multipliers of Ellis' "lowbias32" hash, as signed 32-bit numbers."""


def draw_seed(like: Tensor) -> Tensor:
    """A seed (2,) from torch's generator, which a recomputing checkpoint replays."""
    return torch.empty(2, dtype=torch.int32, device=like.device).random_()


def threshold(p: float) -> int:
    """The smallest signed 16-bit number that stays; ``p`` counts in steps of 2^-16."""
    return min(round(p * 65536), 65535) - 32768


def hashed(seed: Tensor, start: int, stop: int) -> Tensor:
    """``u`` of ``start`` up to ``stop``: odd, int32."""
    u = torch.arange(start, stop, dtype=torch.int32, device=seed.device)
    u = (u * C1) ^ seed[0]
    u = (u ^ (u >> 16)) * C2 + seed[1]
    u = (u ^ (u >> 15)) * C1
    return (u ^ (u >> 16)) | 1


def keep(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which entries stay (rows, columns), bool."""
    pairs = (columns + 1) // 2
    a = hashed(seed, 0, rows)[:, None] * hashed(seed, -pairs, 0).flip(0)
    word = (a ^ (a >> 15)) * C2
    halves = torch.stack([(word << 16) >> 16, word >> 16], -1).flatten(1)
    return halves[:, :columns] >= threshold(p)


def blocks(
    seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``keep`` in blocks ``(from row, to row, ones and zeros)``.

    One buffer serves all blocks, so that a mask as large as the stream never exists.
    """
    size = max(1, min(rows, _BLOCK // columns))
    pairs = (columns + 1) // 2
    u = hashed(seed, -pairs, rows)
    across, down = u[:pairs].flip(0), u[pairs:, None]
    words = torch.empty(size, pairs, dtype=torch.int32)
    shifted = torch.empty_like(words)
    mask = torch.empty(size, columns, dtype=dtype)
    least = threshold(p)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        if stop - start < size:
            words, shifted, mask = (t[: stop - start] for t in (words, shifted, mask))
        torch.mul(down[start:stop], across, out=words)
        torch.bitwise_right_shift(words, 15, out=shifted)
        words.bitwise_xor_(shifted).mul_(C2)
        torch.ge(words.view(torch.int16)[:, :columns], least, out=mask)
        yield start, stop, mask

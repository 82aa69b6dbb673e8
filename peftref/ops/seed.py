"""Dropout without a stored mask: which entries stay follows from a seed and their place.

Entry (i, j) stays when ``h(start(i) + j)``, a signed 32-bit number, is at least the threshold of
``p``. ``h`` is Ellis' "lowbias32", a bijection of 32-bit numbers, and ``start`` hashes the seed and
the row to one of 2^20 places. So a row is a window of one fixed stream, which begins somewhere
else for every row and every seed: a GPU computes the stream in registers, and a CPU, where a random
number an entry would cost more than the product that reads it, copies windows of a table.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["C1", "C2", "PLACES", "blocks", "draw_seed", "keep", "threshold"]

C1 = 0x7FEB352D
C2 = -0x7B935975
"""Multipliers of lowbias32, as signed 32-bit numbers."""

PLACES = 2**20
_BLOCK = 262144  # entries: a block, its mask and its product stay near the core


def draw_seed(like: Tensor) -> Tensor:
    """A seed (2,) from torch's generator, which a recomputing checkpoint replays."""
    return torch.empty(2, dtype=torch.int32, device=like.device).random_()


def threshold(p: float) -> int:
    """The smallest signed 32-bit number that stays."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def keep(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which entries stay (rows, columns), bool."""
    places = torch.arange(columns, dtype=torch.int32, device=seed.device)
    return _hash(_starts(seed, rows)[:, None] + places) >= threshold(p)


def blocks(
    seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield ``keep`` in blocks ``(from row, to row, ones and zeros, room of the same shape)``.

    One mask serves all blocks, so that one as large as the stream never exists; a thread keeps it
    and the room for the next call, since fresh memory costs as much as what is computed in it.
    """
    size = max(1, min(rows, _BLOCK // columns))
    starts = _starts(seed, rows)
    windows = _table(p, dtype, -(-columns // 4096) * 4096).as_strided((PLACES, columns), (1, 1))
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        mask, room = _scratch.take(stop - start, columns, dtype)
        torch.index_select(windows, 0, starts[start:stop], out=mask)
        yield start, stop, mask, room


class _Scratch(threading.local):
    """Two buffers for a block, for each thread and type."""

    def __init__(self) -> None:
        self.held: dict[torch.dtype, Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        count = rows * columns
        held = self.held.get(dtype)
        if held is None or held.shape[1] < count:
            held = self.held[dtype] = torch.empty(2, max(count, _BLOCK), dtype=dtype)
        mask, room = held[:, :count].unbind()
        return mask.view(rows, columns), room.view(rows, columns)


_scratch = _Scratch()


@functools.lru_cache(maxsize=4)
def _table(p: float, dtype: torch.dtype, columns: int) -> Tensor:
    places = torch.arange(PLACES + columns, dtype=torch.int32)
    return (_hash(places) >= threshold(p)).to(dtype)


def _starts(seed: Tensor, rows: int) -> Tensor:
    """A place for each row, by multiplication with odd numbers, whose high bits are random."""
    first, second = seed.unbind()
    u = torch.arange(rows, dtype=torch.int32, device=seed.device).mul_(C2).add_(first)
    u = u.bitwise_xor_(u >> 16).mul_(second | 1)
    return (u >> 12).bitwise_and_(PLACES - 1)


def _hash(u: Tensor) -> Tensor:
    """Lowbias32, the shifts logical."""
    u = (u ^ ((u >> 16) & 0xFFFF)) * C1
    u = (u ^ ((u >> 15) & 0x1FFFF)) * C2
    return u ^ ((u >> 16) & 0xFFFF)

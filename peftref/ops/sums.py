"""Sums over the rows of a stream, in blocks that stay in a core's second cache.

A product as large as the stream is never formed: on a CPU the pages of a fresh buffer cost more
than the arithmetic that fills it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["column_dot", "row_blocks", "wide"]

_BLOCK = 131072  # entries


def wide(*tensors: Tensor) -> torch.dtype:
    """The type that sums are kept in: float32, or float64 where a tensor is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def row_blocks(flat: Tensor) -> Iterator[slice]:
    """Slices of the rows of ``flat`` (rows, columns); one slice off the CPU."""
    rows, columns = flat.shape
    size = max(1, _BLOCK // max(1, columns)) if flat.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def column_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sum_t a_tk * b_tk`` (k,), multiplied and added in ``dtype``."""
    total = a.new_zeros(a.shape[1], dtype=dtype)
    buffer: Tensor | None = None
    for rows in row_blocks(a):
        if buffer is None:
            buffer = a.new_empty(a[rows].shape, dtype=dtype)
        product = buffer[: rows.stop - rows.start]
        if a.dtype == b.dtype == dtype:
            torch.mul(a[rows], b[rows], out=product)
        else:
            product.copy_(a[rows]).mul_(b[rows])
        total += product.sum(0)
    return total

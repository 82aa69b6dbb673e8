"""The definition of a frozen linear with a trained difference at some places of its weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

__all__ = ["STRUCTURES", "difference", "masked_delta_linear"]

STRUCTURES = ("entries", "rows", "columns", "blocks")


def difference(values: Tensor, index: Tensor, shape: tuple[int, int], structure: str) -> Tensor:
    """The trained difference as a matrix of ``shape``; places named twice add up."""
    dense = values.new_zeros(shape)
    if structure == "entries":
        return dense.flatten().index_add(0, index, values).view(shape)
    if structure == "rows":
        return dense.index_add(0, index, values)
    if structure == "columns":
        return dense.index_add(1, index, values)
    size = values.shape[-1]
    grid = shape[0] // size, shape[1] // size
    blocks = values.new_zeros(grid[0] * grid[1], size, size)
    blocks = blocks.index_add(0, index[:, 0] * grid[1] + index[:, 1], values)
    return blocks.view(*grid, size, size).transpose(1, 2).reshape(shape)


def masked_delta_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, structure: str
) -> Tensor:
    """``y = (W + D) x + b``, ``D`` zero but at ``index``.

    Args:
        x: (..., d).
        weight: (k, d).
        bias: (k).
        values: entries (n), rows (n, d), columns (k, n) or blocks (n, s, s).
        index: places in the flat weight (n), rows (n), columns (n), or row and column of a block,
            counted in blocks (n, 2).
        structure: one of ``STRUCTURES``.
    """
    shape = (weight.shape[0], weight.shape[1])
    update = linear(x, difference(values, index, shape, structure).to(x.dtype))
    return linear(x, weight, bias) + update

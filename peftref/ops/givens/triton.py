"""A tree of 2x2 maps on pairs of coordinates on a GPU: the blocks by ``block_rotate``'s kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftref.ops.block_rotate import triton as block_rotate
from peftref.ops.givens import cpu
from peftref.ops.tiles import Variant

__all__ = ["backward", "forward", "variants"]


def forward(x: Tensor, planes: Tensor) -> Tensor:
    """``x P_1 ... P_L``."""
    if x.dtype == torch.float64:
        return cpu.forward(x, planes)
    return cpu.applied(x, planes, block_rotate.rotated)


def backward(dy: Tensor, x: Tensor, planes: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """The gradients of the input and the planes; empty if not wanted."""
    if x.dtype == torch.float64:
        return cpu.backward(dy, x, planes, wanted)
    return cpu.gradients(dy, x, planes, wanted, _block_gradients)


def _block_gradients(
    dy: Tensor, x: Tensor, within: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    return block_rotate.gradients(dy, x, within, recover=False, wanted=wanted)


def variants() -> Iterator[Variant]:
    """The kernels are those of ``block_rotate``."""
    yield from ()

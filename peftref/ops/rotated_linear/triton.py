"""A linear map of a block-rotated input on a GPU: Triton rotates the stream, cuBLAS multiplies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftref.ops.block_rotate import triton as block_rotate
from peftref.ops.tiles import Variant

__all__ = ["backward", "forward", "variants"]


def forward(x: Tensor, rotation: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(x blockdiag(R)) W^T + b``."""
    rotated = block_rotate.forward(x, rotation, recover=False)
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(rotated, weight, bias)


def backward(
    dy: Tensor, x: Tensor, rotation: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of the input and the blocks; empty if not wanted."""
    return block_rotate.backward(dy @ weight, x, rotation, recover=False, wanted=wanted)


def variants() -> Iterator[Variant]:
    """The kernels are those of ``block_rotate``."""
    yield from ()

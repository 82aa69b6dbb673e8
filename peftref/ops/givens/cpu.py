"""A tree of 2x2 maps on pairs of coordinates, by two products of blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftref.ops.block_rotate.cpu import crossed, rotated
from peftref.ops.givens.tree import Tree

__all__ = ["applied", "backward", "forward", "gradients"]

Rotate = Callable[[Tensor, Tensor], Tensor]
Gradients = Callable[[Tensor, Tensor, Tensor, list[bool]], tuple[Tensor, Tensor]]


def forward(x: Tensor, planes: Tensor) -> Tensor:
    """``x P_1 ... P_L``."""
    return applied(x, planes, rotated)


def backward(dy: Tensor, x: Tensor, planes: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """The gradients of the input and the planes; empty if not wanted."""
    return gradients(dy, x, planes, wanted, _block_gradients)


def applied(x: Tensor, planes: Tensor, rotate: Rotate) -> Tensor:
    """``x P_1 ... P_L`` with a form of ``block_rotate``."""
    tree = Tree(planes)
    y = rotate(x.reshape(-1, x.shape[-1]), tree.within.to(x.dtype))
    if tree.across.shape[0] > 1:
        heads = y[:, :: tree.block]
        heads.copy_(heads @ tree.across.to(y.dtype))
    return y.view(x.shape)


def gradients(
    dy: Tensor, x: Tensor, planes: Tensor, wanted: list[bool], through: Gradients
) -> tuple[Tensor, Tensor]:
    """The gradients with a form of ``block_rotate``; empty if not wanted."""
    tree = Tree(planes)
    flat, inner = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    within, across = tree.within.to(dy.dtype), tree.across.to(dy.dtype)
    d_across = torch.zeros_like(tree.across)
    if across.shape[0] > 1:
        after = flat[:, :: tree.block]
        if wanted[1]:
            d_across = _heads(inner, within).t() @ after
        flat = flat.clone()
        flat[:, :: tree.block] = after @ across.t()
    d_x, d_within = through(flat, inner, within, wanted)
    d_planes = planes.new_empty(0)
    if wanted[1]:
        d_planes = tree.gradient(d_within, d_across).to(planes.dtype).contiguous()
    return d_x.view(x.shape) if wanted[0] else d_x, d_planes


def _heads(x: Tensor, within: Tensor) -> Tensor:
    """The first coordinate of each block of ``x blockdiag(within)`` (rows, n)."""
    blocks, block, _ = within.shape
    full = x.shape[1] // block
    tail = full * block
    heads = x.new_empty(x.shape[0], blocks)
    parts = x[:, :tail].unflatten(-1, (full, block))
    heads[:, :full] = torch.bmm(parts.transpose(0, 1), within[:full, :, :1])[..., 0].t()
    if full < blocks:
        heads[:, full] = x[:, tail:] @ within[full, : x.shape[1] - tail, 0]
    return heads


def _block_gradients(
    dy: Tensor, x: Tensor, within: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    d_x, d_within = dy.new_empty(0), dy.new_empty(0)
    if wanted[1]:
        d_within = crossed(x, dy, within.shape[-1])
    if wanted[0]:
        d_x = rotated(dy, within.mT)
    return d_x, d_within

"""A block-diagonal map of the last axis: batched products that read and write in place."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["backward", "crossed", "forward", "rotated"]


def forward(x: Tensor, rotation: Tensor, recover: bool) -> Tensor:  # noqa: ARG001
    """``x blockdiag(R)``."""
    flat = x.reshape(-1, x.shape[-1])
    return rotated(flat, rotation.to(x.dtype)).view(x.shape)


def backward(
    dy: Tensor, kept: Tensor, rotation: Tensor, recover: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """``dx = dy R^T`` and ``dR = x^T dy``, block by block; empty if not wanted.

    Args:
        dy: gradient of the output.
        kept: ``x``, or ``y`` where ``x`` is recovered.
        rotation: the blocks (n, b, b).
        recover: whether ``x = y R^T``.
        wanted: the gradients of ``x`` and of the blocks.
    """
    flat, kept = dy.reshape(-1, dy.shape[-1]), kept.reshape(-1, dy.shape[-1])
    inverse = rotation.to(dy.dtype).mT
    d_x, d_rotation = dy.new_empty(0), rotation.new_empty(0)
    if wanted[1]:
        x = rotated(kept, inverse) if recover else kept
        d_rotation = crossed(x, flat, rotation.shape[-1]).to(rotation.dtype)
    if wanted[0]:
        d_x = rotated(flat, inverse).view(dy.shape)
    return d_x, d_rotation


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """``x blockdiag(R)`` of rows (t, d); of a last block that exceeds ``d``, the upper left."""
    (rows, width), (blocks, block, _) = x.shape, rotation.shape
    y = torch.empty_like(x)
    full = width // block
    tail = full * block
    if full:
        # Written where it belongs: a result of its own order would be copied.
        into = y[:, :tail].view(rows, full, block).transpose(0, 1)
        parts = x[:, :tail].unflatten(-1, (full, block)).transpose(0, 1)
        torch.bmm(parts, rotation[:full], out=into)
    if full < blocks:
        rest = width - tail
        torch.mm(x[:, tail:], rotation[full, :rest, :rest], out=y[:, tail:])
    return y


def crossed(x: Tensor, y: Tensor, block: int) -> Tensor:
    """``x^T y`` block by block (n, b, b), zero outside a last block that exceeds the width."""
    full = x.shape[1] // block
    tail = full * block
    parts = (t[:, :tail].unflatten(-1, (full, block)).transpose(0, 1) for t in (x, y))
    left, right = parts
    found = torch.bmm(left.mT, right)
    if tail == x.shape[1]:
        return found
    rest = torch.nn.functional.pad(
        x[:, tail:].t() @ y[:, tail:], (0, tail + block - x.shape[1]) * 2
    )
    return torch.cat((found, rest[None]))

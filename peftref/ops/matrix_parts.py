"""Parts of a matrix, the same on every machine up to rounding: leading singular triplets, QR."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_qr", "leading_svd"]

_EXACT = 1024  # the smaller side up to which all singular values are computed
_EXTRA, _ROUNDS = 16, 6  # Halko et al. 2011: columns beyond the rank, and power iterations


def leading_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U (m, r)``, ``S (r)``, ``V^T (r, n)`` of the largest singular values.

    Exact for matrices of a smaller side up to 1,024; above, by a randomised range finder from a
    fixed seed (Halko et al. 2011, https://arxiv.org/abs/0909.4061) where that is less work. The
    largest entry of each column of ``U`` is positive.
    """
    smaller = min(weight.shape)
    if smaller <= _EXACT or rank + _EXTRA >= smaller // 2:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vt = _randomised(weight, rank)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    largest = u.abs().argmax(0)
    sign = torch.where(u[largest, torch.arange(rank)] < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, vt * sign[:, None]


def _randomised(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = weight.shape[1], rank + _EXTRA
    test = torch.randn(shape, generator=generator, dtype=torch.float32).to(weight.dtype)
    q, _ = torch.linalg.qr(weight @ test)
    for _ in range(_ROUNDS):
        z, _ = torch.linalg.qr(weight.mT @ q)
        q, _ = torch.linalg.qr(weight @ z)
    u, s, vt = torch.linalg.svd(q.mT @ weight, full_matrices=False)
    return q @ u, s, vt


def leading_qr(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first ``rank`` columns of ``Q`` and rows of ``R``, whose diagonal is positive."""
    q, r = torch.linalg.qr(weight)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return (q * sign)[:, :rank], (r * sign[:, None])[:rank]

"""A chain of reflections as one low-rank map of the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from peftref.ops.sums import wide

__all__ = ["householder"]


def householder(x: Tensor, vectors: Tensor) -> Tensor:
    """``x H_1 ... H_r = x - ((x U^T) T) U``, ``U`` the unit vectors (r, d), ``T`` (r, r) upper.

    ``T^-1 = I / 2 + (what of U U^T is above the diagonal)``: the compact form of Schreiber and Van
    Loan 1989. Three thin products instead of r passes over the stream; torch's own gradient keeps
    ``x`` and two matrices of r columns.

    Args:
        x: (..., d).
        vectors: the ``u_i`` (r, d), none of them zero; in the type of ``x`` or a wider one.
    """
    with torch.autocast(x.device.type, enabled=False):
        units = torch.nn.functional.normalize(vectors.to(wide(vectors)), dim=-1)
        eye = torch.eye(units.shape[0], dtype=units.dtype, device=units.device)
        inverse = (units @ units.mT).triu(1) + eye / 2
        mixed = torch.linalg.solve_triangular(inverse, units, upper=True)
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ units.to(x.dtype).mT
        return torch.addmm(flat, low, mixed.to(x.dtype), alpha=-1).view(x.shape)

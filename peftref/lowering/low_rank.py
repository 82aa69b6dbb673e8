"""The factors of edits that are low-rank additions to one weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftref.lowering.program import scatter_rows
from peftref.lowering.swap import state_of

__all__ = ["low_rank_factors"]


def low_rank_factors(module: nn.Module, adapter: str) -> tuple[Tensor, Tensor]:
    """Return ``A`` (r, d_in) and ``B`` (d_out, r) with ``W' = W + B A``, scales folded into B.

    Several low-rank edits of one module are laid side by side: the rank is their sum. Edits of a
    slice have zero rows elsewhere. Only for modules whose edits are all low rank.
    """
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for _, edit in state_of(module).bound(adapter):
        down, up = edit.linear_tensors()
        downs.append(down)
        ups.append(scatter_rows(up * edit.scale, edit.rows, 0))
    return torch.cat(downs, 0), torch.cat(ups, 1)

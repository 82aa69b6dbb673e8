"""Matrices that a module reads itself (experts of a mixture, routers), with their edits.

The module sees the edited tensor through a property of its swapped class. A tensor of several
experts is formed as a whole, once a call, whichever way the module multiplies by it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftref.backbone.site_table import Site, SiteKind
from peftref.ir.types import Stage
from peftref.lowering.program import BoundEdit, gather_rows, scatter_rows
from peftref.lowering.weight import dense_weight

__all__ = ["Matrices", "fold_weight", "stored_matrix"]


def stored_matrix(module: nn.Module, site: Site) -> Tensor:
    """The frozen weight at a site, all its rows: (rows, d_in)."""
    if site.kind is not SiteKind.MATRIX:
        return dense_weight(module)
    tensor = module._parameters[site.tensor]
    if tensor is None:
        raise TypeError(f"{site.label}: the module has no tensor {site.tensor!r}")
    return _laid(tensor, site)


def fold_weight(weight: Tensor, edits: list[BoundEdit]) -> Tensor:
    """The left fold of edits over a weight (rows, d_in), in float32 at least."""
    # An update below half a unit in the last place of a 16-bit weight would be lost.
    dtype = torch.promote_types(weight.dtype, torch.float32) if edits else weight.dtype
    weight = weight.to(dtype)
    for edit in edits:
        if edit.stage is Stage.WEIGHT_ADD:
            weight = weight + scatter_rows(edit.matrix(None, dtype), edit.rows, 0)
            continue
        rows = gather_rows(weight, edit.rows, 0)
        if edit.stage is Stage.WEIGHT_ROTATE:
            new = rows @ edit.matrix(None, dtype)
        else:
            new = edit.matrix(rows, dtype)
        weight = new if edit.rows is None else weight + scatter_rows(new - rows, edit.rows, 0)
    return weight


class Matrices:
    """The edits of one module's own matrices and biases, in the order of the fold."""

    def __init__(self, edits: list[BoundEdit]) -> None:
        self._edits: dict[str, list[BoundEdit]] = {}
        for edit in edits:
            site = edit.edit.write.site
            name = site.bias_tensor if edit.stage is Stage.BIAS else site.tensor
            self._edits.setdefault(name, []).append(edit)
        self._formed: dict[str, Tensor] | None = None

    def __bool__(self) -> bool:
        return bool(self._edits)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are edited."""
        return tuple(self._edits)

    def begin(self) -> None:
        """Form each tensor once from here on: some modules read one for every expert."""
        self._formed = {}

    def end(self) -> None:
        """Hold nothing between calls."""
        self._formed = None

    def effective(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with its edits, laid out and typed as it is stored."""
        edits = self._edits.get(name)
        if not edits:
            return tensor
        if self._formed is None:
            return _edited(tensor, edits)
        if name not in self._formed:
            self._formed[name] = _edited(tensor, edits)
        return self._formed[name]


def _edited(tensor: Tensor, edits: list[BoundEdit]) -> Tensor:
    if edits[0].edit.write.site.expert is None:
        return _one(tensor, edits)
    parts = list(tensor.unbind(0))
    for expert in range(len(parts)):
        own = [e for e in edits if e.edit.write.site.expert == expert]
        if own:
            parts[expert] = _one(parts[expert], own)
    return torch.stack(parts)


def _one(part: Tensor, edits: list[BoundEdit]) -> Tensor:
    if edits[0].stage is Stage.BIAS:
        for edit in edits:
            part = part + scatter_rows(edit.matrix(None, part.dtype), edit.rows)
        return part
    transposed = edits[0].edit.write.site.transposed
    folded = fold_weight(part.mT if transposed else part, edits)
    return (folded.mT if transposed else folded).to(part.dtype)


def _laid(tensor: Tensor, site: Site) -> Tensor:
    part = tensor if site.expert is None else tensor[site.expert]
    return part.mT if site.transposed else part

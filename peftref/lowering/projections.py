"""The frozen key and value projections of an attention sub-layer, for rows of ours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import linear

from peftref.backbone.site_table import RowSlice, Site, SiteTable
from peftref.errors import BackboneError
from peftref.lowering.program import gather_rows
from peftref.lowering.weight import dense_weight

__all__ = ["Projection", "own_projections"]


@dataclass(frozen=True)
class Projection:
    """A linear module, or some rows of it."""

    module: nn.Module
    rows: RowSlice | None

    def __call__(self, x: Tensor) -> Tensor:
        """The frozen map of ``x``, in the type of ``x``."""
        weight = gather_rows(dense_weight(self.module), self.rows, 0)
        bias = self.module._parameters.get("bias")
        bias = None if bias is None else gather_rows(bias, self.rows).to(x.dtype)
        return linear(x, weight.to(x.dtype), bias)


def own_projections(
    model: nn.Module, table: SiteTable, attention: Site
) -> tuple[Projection, Projection]:
    """Return the key and value projections of an attention sub-layer.

    Raises:
        BackboneError: the sub-layer has none (a latent attention makes keys in several steps).
    """
    found: list[Projection] = []
    for part in ("key", "value"):
        role = f"{attention.role}.{part}"
        sites = [s for s in table if (s.role, s.stack, s.layer) == (
            role, attention.stack, attention.layer)]
        if len(sites) != 1:
            raise BackboneError(
                f"{attention.label}: has no single linear {role}, so that its own projections "
                "cannot make keys and values of learned rows; use prefix_tuning"
            )
        found.append(Projection(model.get_submodule(sites[0].module), sites[0].rows))
    return found[0], found[1]

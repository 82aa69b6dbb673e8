"""FLOPs and bytes of a plan, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from peftref.backbone.site_table import SiteKind, SiteTable
from peftref.ir.edits import EditPlan, ModulePlan
from peftref.ir.types import Stage

__all__ = ["Cost"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step of ``tokens`` tokens costs beyond the backbone.

    Attributes:
        tokens: tokens a step.
        forward_flops: multiply-adds times two that the adapter adds to one forward.
        backbone_forward_flops: those of the backbone's linear modules.
        parameter_bytes: float32 bytes of the trained tensors.
        optimiser_bytes: bytes of gradients and both Adam moments.
    """

    tokens: int
    forward_flops: int
    backbone_forward_flops: int
    parameter_bytes: int
    optimiser_bytes: int

    @classmethod
    def of(
        cls, modules: tuple[ModulePlan, ...], table: SiteTable, trained: int, tokens: int
    ) -> Cost:
        """Count the edits of ``modules`` with ``trained`` trained parameters."""
        forward = sum(_edit_flops(e, tokens) for m in modules for e in m.edits)
        return cls(tokens, forward, tokens * _backbone_flops(table), 4 * trained, 12 * trained)


def _edit_flops(edit: EditPlan, tokens: int) -> int:
    steps = [step.primitive for step in edit.program.steps]
    if edit.stage in (Stage.KEYS_VALUES, Stage.TOKENS):
        rows = max((t.shape[-2] for step in steps for t in step.tensors() if len(t.shape) > 1),
                   default=1)
        per_row = sum(step.flops() for step in steps)
        attended = 4 * edit.write.site.d_in * rows if edit.stage is Stage.KEYS_VALUES else 0
        return rows * per_row + tokens * attended
    if edit.formed or edit.stage is Stage.WEIGHT_NORM:
        return sum(step.matrix_flops() for step in steps) + _forming(edit)
    return tokens * sum(step.flops() for step in steps)


def _forming(edit: EditPlan) -> int:
    """Products of the factors: each link applied to the columns before it."""
    widths = [step.primitive.flops() for step in edit.program.steps]
    return edit.write.site.d_in * widths[-1] if len(widths) > 1 else 0


def _backbone_flops(table: SiteTable) -> int:
    seen: dict[str, int] = {}
    for site in table:
        if site.kind is SiteKind.LINEAR:
            rows = site.rows.groups * site.rows.size if site.rows else site.d_out
            seen[site.module] = 2 * site.d_in * rows * site.shared_by
    return sum(seen.values())

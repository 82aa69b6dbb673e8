"""Where things stand in a forward pass: what lies below the lowest edit is not differentiated."""

from __future__ import annotations

from peftref.backbone.site_table import Site, SiteTable
from peftref.ir.edits import EditPlan, ModulePlan
from peftref.ir.types import Stage
from peftref.spec.typology import Port

__all__ = ["BEFORE", "Depth", "depth", "edit_depth", "lowest", "part_depth"]

Depth = tuple[int, int, float]
"""Stack, layer, rank inside the layer."""

BEFORE: Depth = (0, -1, 0.0)
_AFTER = 10**9
_RANKS = {
    "attention.query": 1, "attention.key": 1, "attention.value": 1, "norm.query": 1.5,
    "norm.key": 1.5, "attention.output": 3, "attention": 3, "norm.attention_output": 3.5,
    "mixer": 3,
    "cross_attention.query": 6, "cross_attention.key": 6, "cross_attention.value": 6,
    "cross_attention.output": 7, "cross_attention": 7,
    "router": 8.5, "ffn.up": 9, "ffn.gate": 9, "experts.up": 9, "experts.gate": 9,
    "ffn.down": 11, "experts.down": 11, "ffn": 11, "norm.ffn_output": 11.5, "residual.ffn": 12,
    "block": 13,
}  # fmt: skip
_NORMS = {
    "norm.attention": (0.0, 4.0), "norm.mixer": (0.0, 4.0), "norm.cross_attention": (5.0, 7.5),
    "norm.ffn": (8.0, 12.5),
}
_BEGINS = {"attention": 0.5, "cross_attention": 5.5, "ffn": 8.5, "block": -0.5, "mixer": 0.5}


def part_depth(table: SiteTable, stack: str, layer: int, rank: float) -> Depth:
    """Return the depth of a part of a layer that is no site, such as the softmax."""
    return [*table.layers].index(stack) if stack in table.layers else 0, layer, rank


def depth(table: SiteTable, site: Site) -> Depth:
    """Return where ``site`` computes."""
    if site.layer is None:
        begins = site.role.startswith("embedding") or site.role == "norm.embedding"
        return part_depth(table, site.stack, -1 if begins else _AFTER, 0.0)
    if site.role in _NORMS:
        return part_depth(table, site.stack, site.layer, _NORMS[site.role][not table.pre_norm])
    return part_depth(table, site.stack, site.layer, float(_RANKS.get(site.role, 3)))


def edit_depth(table: SiteTable, edit: EditPlan) -> Depth:
    """Return where an edit enters."""
    site = edit.write.site
    if edit.stage is Stage.TOKENS:
        return BEFORE
    stack, layer, rank = depth(table, site)
    if edit.stage is Stage.KEYS_VALUES:
        return stack, layer, 6.0 if site.role == "cross_attention" else 1.0
    if edit.write.port is Port.INPUT:
        return stack, layer, _BEGINS.get(site.role, rank)
    return stack, layer, rank


def lowest(table: SiteTable, modules: tuple[ModulePlan, ...]) -> Depth | None:
    """Return the depth of the first trained edit; None: nothing is trained in the backbone."""
    found = [edit_depth(table, edit) for module in modules for edit in module.edits]
    return min(found, default=None)

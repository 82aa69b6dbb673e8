"""FLOPs of a training step, as torch's counter finds them: products of matrices only."""

from __future__ import annotations

from peftref.backbone.site_table import Site, SiteKind
from peftref.ir.depth import Depth, depth, edit_depth, lowest, part_depth
from peftref.ir.memory import Step, Traits
from peftref.ir.plan import Plan
from peftref.ir.types import Stage

__all__ = ["step_flops"]


def step_flops(plan: Plan, traits: Traits, step: Step) -> tuple[int, int]:
    """Return the FLOPs of the forward and of the backward pass.

    A frozen linear above the lowest edit takes one product more in the backward pass, a product of
    two trained or differentiated tensors two.
    """
    table, low = plan.table, lowest(plan.table, plan.modules)
    length = traits.tokens or step.length
    tokens = step.batch * length
    forward, backward, seen = step.batch * traits.stem_flops, 0, set[str]()
    for site in table:
        at = depth(table, site)
        own = _linear(site, tokens, step.batch) if site.module not in seen else 0
        if site.kind is SiteKind.LINEAR:
            seen.add(site.module)
        scores = _scores(site, tokens, length)
        forward += own + scores
        if low is None:
            # The head alone is trained: its input has no gradient.
            backward += 0
            continue
        backward += own * (at > low)
        if scores:
            core = 2.0 if site.role == "attention" else 6.5
            inside = part_depth(table, site.stack, site.layer or 0, core)
            backward += 2 * scores * (inside > low)
    added = plan.cost(tokens, sequences=step.batch).forward_flops
    return forward + added, backward + int(added * _factor(plan, low)) + _formed(plan, tokens)


def _linear(site: Site, tokens: int, sequences: int) -> int:
    if site.kind is not SiteKind.LINEAR:
        return 0
    rows = site.rows.groups * site.rows.size if site.rows else site.d_out
    # A pooler reads the first token only.
    reads = sequences if site.role == "pooler" else tokens
    return 2 * reads * site.d_in * rows * site.shared_by


def _scores(site: Site, tokens: int, length: int) -> int:
    if site.attention is None or site.role not in ("attention", "cross_attention"):
        return 0
    shape = site.attention
    width = shape.heads * (shape.head_width + (shape.value_width or shape.head_width))
    return 2 * tokens * length * width * site.shared_by


def _factor(plan: Plan, low: Depth | None) -> float:
    """Backward over forward of the adapter; edits at the lowest depth pass no gradient on."""
    edits = [edit for module in plan.modules for edit in module.edits if edit.flops]
    if not edits or low is None:
        return 2.0
    ends = sum(edit.flops for edit in edits if edit_depth(plan.table, edit) == low)
    return 2.0 - 0.5 * ends / sum(edit.flops for edit in edits)


def _formed(plan: Plan, tokens: int) -> int:
    """A formed weight has a whole gradient, one product more for every linear."""
    found = 0
    for module in plan.modules:
        matrix = any(e.formed or e.write.needs_matrix for e in module.edits)
        site = module.edits[0].write.site
        if matrix and site.kind is SiteKind.LINEAR and module.edits[0].stage is not Stage.TOKENS:
            found += _linear(site, tokens, tokens)
    return found

"""FLOPs and bytes of a plan, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from peftref.backbone.site_table import SiteKind, SiteTable
from peftref.ir.activations import kept_per_token, kept_weights
from peftref.ir.edits import EditPlan, ModulePlan
from peftref.ir.pattern import low_rank
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
        activation_bytes: what autograd keeps of a step, formed weights included, in float32 and
            without dropout.
    """

    tokens: int
    forward_flops: int
    backbone_forward_flops: int
    parameter_bytes: int
    optimiser_bytes: int
    activation_bytes: int

    @classmethod
    def of(
        cls,
        modules: tuple[ModulePlan, ...],
        table: SiteTable,
        trained: int,
        tokens: int,
        sequences: int = 1,
    ) -> Cost:
        """Count the edits of ``modules`` with ``trained`` trained parameters."""
        forward = sum(_module_flops(module, tokens) for module in modules)
        prompts = [e for m in modules for e in m.edits if e.stage is Stage.TOKENS]
        if prompts:
            rows = sum(_rows(edit) for edit in prompts)
            forward += _prompt_flops(table, prompts[0].write.site.stack, rows, tokens, sequences)
        return cls(
            tokens, forward, tokens * _backbone_flops(table), 4 * trained, 12 * trained,
            4 * (tokens * kept_per_token(modules, table) + kept_weights(modules)),
        )


def _module_flops(module: ModulePlan, tokens: int) -> int:
    weights = [edit for edit in module.edits if edit.stage.on_weight]
    flops = sum(_edit_flops(edit, tokens) for edit in module.edits)
    sites = {e.write.site for e in module.edits if e.stage is Stage.INPUT and e.write.site.rows}
    # The extra product of a slice with its own input.
    flops += sum(2 * tokens * site.d_in * site.d_out for site in sites)
    if not any(edit.formed for edit in weights):
        # A norm, and the product of a slice, need the weight all the same.
        forms = bool(sites) or any(edit.stage is Stage.WEIGHT_NORM for edit in weights)
        flops += sum(_forming(edit) for edit in weights if forms and not edit.write.needs_matrix)
    # A layer that runs several times runs its edits as often.
    return flops * max(edit.write.site.shared_by for edit in module.edits)


def _edit_flops(edit: EditPlan, tokens: int) -> int:
    site, write = edit.write.site, edit.write
    per_token = edit.flops
    if edit.stage is Stage.TOKENS:
        return _rows(edit) * per_token
    if edit.stage is Stage.KEYS_VALUES:
        width = site.attention.heads * site.attention.head_width if site.attention else 0
        return _rows(edit) * (per_token + tokens * 4 * width)
    if edit.formed or edit.stage is Stage.WEIGHT_NORM:
        return _forming(edit)
    if write.needs_matrix and site.kind is SiteKind.LINEAR:
        return _forming(edit) + 2 * tokens * site.d_in * site.d_out
    if edit.stage is Stage.WEIGHT_ROTATE and site.rows is not None:
        # The rows of a slice once more, with the change of its stream.
        return tokens * (per_token + 2 * site.d_in * site.d_out)
    if write.op == "bottleneck":
        return tokens * (per_token + 2 * site.d_out)  # the bias is one more column of the product
    if write.op == "lora_linear" and site.rows is not None:
        # The up-projections of slices lie side by side, with zeros at the rows of the others.
        thin = low_rank([step.primitive for step in edit.program.steps
                         if not step.primitive.on_tensors])
        others = site.rows.groups * site.rows.size - site.d_out
        return tokens * (per_token + 2 * others * (thin.rank if thin is not None else 0))
    if write.op == "rotated_linear":
        # It turns the weight where that has fewer rows than the stream.
        return min(tokens, site.d_out) * per_token
    return tokens * per_token


def _rows(edit: EditPlan) -> int:
    """Rows that a function of learned tokens gives."""
    shapes = [t.shape for step in edit.program.steps for t in step.primitive.tensors()]
    return max((shape[-2] for shape in shapes[:1] if len(shape) > 1), default=1)


def _forming(edit: EditPlan) -> int:
    """The matrix of a function: each link is applied to the columns of the link before it."""
    flops = sum(step.primitive.matrix_flops() for step in edit.program.steps)
    for step in edit.program.steps:
        if step.inputs and step.inputs[0] > len(edit.program.tensors):
            flops += edit.write.site.d_in * step.primitive.flops()
    if edit.stage is Stage.WEIGHT_ROTATE:
        flops += 2 * edit.write.site.d_out * edit.write.site.d_in**2
    return flops


def _prompt_flops(table: SiteTable, stack: str, rows: int, tokens: int, sequences: int) -> int:
    """Virtual tokens run through every layer that sees them, in each sequence."""
    flops = sequences * rows * _backbone_flops(table, stack)
    whole = tokens + sequences * rows
    for site in table:
        if site.attention is None:
            continue
        width = site.attention.heads * site.attention.head_width
        if site.stack == stack and site.role == "attention":
            flops += 4 * width * (whole**2 - tokens**2) // sequences * site.shared_by
        elif site.role == "cross_attention":
            flops += 4 * width * tokens * rows
    return flops


def _backbone_flops(table: SiteTable, stack: str | None = None) -> int:
    """Per token; with ``stack``: of a token that only this stack's inputs hold."""
    seen: dict[str, int] = {}
    for site in table:
        if stack in (None, site.reads_stack) and site.kind is SiteKind.LINEAR:
            rows = site.rows.groups * site.rows.size if site.rows else site.d_out
            seen[site.module] = 2 * site.d_in * rows * site.shared_by
    return sum(seen.values())

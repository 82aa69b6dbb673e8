"""Fold adapters into weights and biases, and back from kept copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftref.backbone.hf.offload import is_offloaded
from peftref.errors import MergeError
from peftref.ir.types import Stage
from peftref.lowering.attach import Attachment, refresh
from peftref.lowering.fold import Fold
from peftref.lowering.program import BoundEdit, gather_rows, scatter_rows
from peftref.lowering.state import AdapterState, settled
from peftref.lowering.swap import state_of
from peftref.lowering.weight import (
    dense_weight,
    is_plain_linear,
    is_product,
    store_weight,
)

__all__ = ["merge_modules", "unmerge_modules"]


@dataclass
class Kept:
    """What a module had before merging."""

    parameters: dict[str, nn.Parameter | None]
    untied: bool = False
    tie_word_embeddings: bool | None = None


def merge_modules(
    model: nn.Module, attachment: Attachment, *, partial: bool, dequantize: bool = False
) -> tuple[str, ...]:
    """Merge all modules of an adapter; see ``Adapted.merge``."""
    blockers = attachment.plan.properties.blockers
    if blockers and not partial:
        shown = "; ".join(blockers[:3])
        more = f"; and {len(blockers) - 3} more" if len(blockers) > 3 else ""
        raise MergeError(
            f"{len(blockers)} edits cannot be folded into weights: {shown}{more}. Merge what can "
            "be with partial=True, or keep the adapter attached"
        )
    paths = [m.path for m in attachment.plan.modules]
    for path in paths:
        _refuse(path, attachment.modules[path], attachment.name, dequantize=dequantize)
    left: list[str] = []
    with torch.no_grad(), settled(state_of(attachment.modules[path]) for path in paths):
        for path in paths:
            left.extend(_merge_module(model, path, attachment))
    refresh(model)
    return tuple(left)


def _refuse(path: str, module: nn.Module, name: str, *, dequantize: bool) -> None:
    state = state_of(module)
    if not state.adapters[name].active:
        raise MergeError(f"{path}: adapter {name!r} is disabled; enable it, then merge")
    weights = [e for _, e in state.bound(name) if e.stage.on_weight or e.stage is Stage.INPUT]
    if is_offloaded(module):
        raise MergeError(
            f"{path}: its weights are offloaded, and brought back unmerged for each call; load "
            "the backbone without offloading to merge"
        )
    linear = any(e.edit.write.site.kind.value == "linear" for e in weights)
    if linear and not is_plain_linear(module) and not (dequantize and is_product(module)):
        plain = ", or give this module an ordinary weight by merge(dequantize=True)"
        raise MergeError(
            f"{path}: a {type(module).__name__} with a quantised or foreign weight cannot take a "
            "merge exactly; load the backbone unquantised to merge"
            f"{plain if is_product(module) else ''}"
        )
    others = [n for n, held in state.adapters.items() if n != name and held.edits and held.active]
    if others:
        raise MergeError(
            f"{path}: adapter {others[0]!r} edits this module too, and the order of the two would "
            f"change; disable or detach {others[0]!r}, or merge it first"
        )


def _merge_module(model: nn.Module, path: str, attachment: Attachment) -> list[str]:
    module = attachment.modules[path]
    state = state_of(module)
    held = state.adapters[attachment.name]
    if held.merged:
        return []
    bound = [edit for _, edit in state.bound(attachment.name)]
    chosen, left = _prefix_of_fold(bound)
    if not chosen:
        return left
    merged = _folded(module, state, chosen)
    kept = Kept({name: module._parameters.get(name) for name in ("weight", "bias", *merged)})
    if "weight" in merged:
        _untie(model, module, kept)
    for name, tensor in merged.items():
        _put(module, name, tensor)
    state.__dict__.setdefault("kept", {})[attachment.name] = kept
    done = {id(edit.edit) for edit in chosen}
    held.merged = frozenset(i for i, e in enumerate(held.edits) if id(e) in done)
    state.changed()
    return left


def _prefix_of_fold(bound: list[BoundEdit]) -> tuple[list[BoundEdit], list[str]]:
    """Split into what can be merged and reasons for the rest.

    Input edits merge from the last one back, as nothing may stand between them and the weight;
    output edits from the first one on, and only when no parallel write comes before them.
    """
    by_stage: dict[Stage, list[BoundEdit]] = {}
    for edit in bound:
        by_stage.setdefault(edit.stage, []).append(edit)
    stays = any(e.stage.on_weight and not e.edit.mergeable for e in bound)
    # What a gated edit of the weight stands behind is the same in any order for sums alone.
    chosen = [e for e in bound if e.edit.mergeable and (
        e.stage is Stage.BIAS or e.stage is Stage.WEIGHT_ADD or (
            e.stage.on_weight and not stays))]
    reads_input = bool(by_stage.get(Stage.PARALLEL))
    reads_input = reads_input or any(e.edit.write.looks_back for e in bound)
    for edit in reversed(by_stage.get(Stage.INPUT, [])):
        if not edit.edit.mergeable or reads_input:
            break
        chosen.append(edit)
    if not by_stage.get(Stage.PARALLEL):
        for edit in by_stage.get(Stage.OUTPUT, []):
            if not edit.edit.mergeable:
                break
            chosen.append(edit)
    taken = {id(edit) for edit in chosen}
    if any(edit.reads_weight for edit in bound if id(edit) not in taken):
        taken = set()  # what stays would read another weight
    left = [f"{e.edit.write.label} stays" for e in bound if id(e) not in taken]
    return [e for e in bound if id(e) in taken], left


def _folded(
    module: nn.Module, state: AdapterState, chosen: list[BoundEdit]
) -> dict[str, Tensor]:
    """The tensors of the module that the chosen edits change, with them."""
    fold = Fold(module, chosen, state.argument)
    if not fold.linear:
        own = {n: module._parameters.get(n) for n in ("weight", "bias")}
        names = {"weight"} if fold.weights else set[str]()
        names |= {"bias"} if fold.biases else set()
        if fold.matrices:
            names = set(fold.matrices.names)
            own = {n: module._parameters.get(n) for n in names}
        return {n: fold.effective(n, p) for n, p in own.items() if p is not None and n in names}
    touches = fold.weights or fold.inputs or fold.outputs
    # In the type of the weight's own arithmetic but never below float32: rounding once.
    wide = torch.promote_types(dense_weight(module).dtype, torch.float32)
    weight = fold.weight(module).to(wide)
    bias = fold.bias(module)
    bias = None if bias is None else bias.to(wide)
    for edit in reversed(fold.inputs):  # the last one stands next to the weight
        eye = torch.eye(weight.shape[1], dtype=wide, device=weight.device)
        weight = weight @ edit.join_matrix(eye, wide)
    for edit in fold.outputs:
        rows = gather_rows(weight, edit.rows, 0)
        new = edit.join_matrix(rows, wide)
        weight = new if edit.rows is None else weight + scatter_rows(new - rows, edit.rows, 0)
        if bias is not None:
            part = gather_rows(bias, edit.rows)
            moved = edit.join_whole(part)
            whole = edit.rows is None
            bias = moved if whole else bias + scatter_rows(moved - part, edit.rows)
    changed = bool(fold.biases or fold.outputs)
    new = {"weight": store_weight(module, weight)} if touches else {}
    if bias is not None and changed:
        new["bias"] = _like(bias, module._parameters["bias"])
    return new


def _like(value: Tensor, stored: Tensor | None) -> Tensor:
    return value if stored is None else value.to(stored.dtype)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    module._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)


def _untie(model: nn.Module, module: nn.Module, kept: Kept) -> None:
    """A tied head gets a weight of its own, else the embedding would change with it."""
    weight = module._parameters.get("weight")
    others = [
        other
        for other in model.modules()
        if other is not module and other._parameters.get("weight") is weight
    ]
    config = getattr(model, "config", None)
    if others and config is not None and getattr(config, "tie_word_embeddings", False):
        kept.tie_word_embeddings = True
        config.tie_word_embeddings = False
    kept.untied = bool(others)


def unmerge_modules(model: nn.Module, attachment: Attachment) -> None:
    """Put the kept parameters back."""
    for path in (m.path for m in attachment.plan.modules):
        module = attachment.modules[path]
        state = state_of(module)
        kept: Kept | None = state.__dict__.get("kept", {}).pop(attachment.name, None)
        if kept is None:
            continue
        for name, parameter in kept.parameters.items():
            if name in module._parameters:
                module._parameters[name] = parameter
        if kept.tie_word_embeddings:
            setattr(model.config, "tie_word_embeddings", True)  # noqa: B010 - typed as a tensor
        state.adapters[attachment.name].merged = frozenset()
        state.changed()
    refresh(model)

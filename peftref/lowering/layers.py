"""Whole layers that are swapped for what passes through them."""

from __future__ import annotations

from torch import nn

from peftref.ir.types import SEAM
from peftref.lowering.attachment import Attachment
from peftref.lowering.root import RootState
from peftref.lowering.state import AdapterEdits, AdapterState, Seam
from peftref.lowering.swap import state_of, swap
from peftref.spec.typology import Port

__all__ = ["carry_masks", "collect_layers", "put_seams"]


def carry_masks(model: nn.Module, root: RootState, attachment: Attachment) -> None:
    """Let each layer hand the padding masks to its own forward, for when it is recomputed."""
    if not attachment.plan.properties.needs_token_mask:
        return
    for site in attachment.plan.table:
        if site.role == "block":
            _swap_layer(model, root, attachment, site.module).masked_block = True


def _swap_layer(
    model: nn.Module, root: RootState, attachment: Attachment, path: str
) -> AdapterState:
    """Swap a whole layer, which may have no edit of its own."""
    if path not in attachment.modules:
        module = model.get_submodule(path)
        state = swap(module, path, root.context)
        state.__dict__["root"] = root
        state.adapters.setdefault(attachment.name, AdapterEdits((), ()))
        attachment.modules[path] = module
    return state_of(attachment.modules[path])


def collect_layers(model: nn.Module, root: RootState, attachment: Attachment) -> None:
    """Let the layers of a stack keep what they give, where some edit reads all of it."""
    edits = [edit for module in attachment.plan.modules for edit in module.edits]
    for edit in edits:
        if edit.write.read is not Port.HIDDEN_STATES:
            continue
        stack = edit.write.site.stack
        layers = [s for s in attachment.plan.table if s.role == "block" and s.stack == stack]
        for site in layers:
            state = _swap_layer(model, root, attachment, site.module)
            state.collects = stack, sum(layer.shared_by for layer in layers)


def put_seams(model: nn.Module, root: RootState, attachment: Attachment) -> None:
    """Let the norm behind attention part each layer that runs on two streams in halves."""
    table = attachment.plan.table
    norms = {(s.stack, s.layer): s.module for s in table if s.role == SEAM}
    for module in attachment.plan.modules:
        for edit in module.edits:
            site, streams = edit.write.site, edit.write.streams
            if streams is None or streams.layer != "halves":
                continue
            layer = state_of(attachment.modules[module.path])
            norm = _swap_layer(model, root, attachment, norms[site.stack, site.layer])
            layer.seam = norm.at_seam = layer.seam or Seam()

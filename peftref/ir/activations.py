"""What autograd keeps of a step for the backward pass, from shapes alone.

A frozen linear keeps nothing; what its trained edit reads is kept once, however many edits read it.
Counted are float32 elements a token, without dropout and with attention that keeps no scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from peftref.backbone.site_table import Site, SiteKind, SiteTable
from peftref.ir.edits import EditPlan, ModulePlan
from peftref.ir.types import Stage, Streams
from peftref.spec.typology import Port

__all__ = ["inversions", "kept_per_token", "kept_weights"]

FLOAT32 = 2.0**-23
_ERROR = 1e-3
"""Relative error of a reconstructed input that is accepted, if every inversion is the worst."""

Kept = dict[tuple[str, int | None, str], int]


def inversions(streams: Streams, epsilon: float = FLOAT32) -> int:
    """Return how many layers in a row may be inverted: rounding grows by ``1 / (a b)`` in each.

    The layer below keeps its input, from which those further down go on.

    Args:
        streams: how a layer runs on two streams.
        epsilon: distance from 1 to the next number of the type.
    """
    if streams.inversions is not None:
        return streams.inversions
    growth = 1 / (streams.scales[0] * streams.scales[1])
    if growth <= 1:
        return streams.count
    return max(int(math.log(_ERROR / epsilon) / math.log(growth) + 1e-9), 0)


def kept_per_token(modules: tuple[ModulePlan, ...], table: SiteTable) -> int:
    """Return how many elements are kept for each token."""
    edits = [edit for module in modules for edit in module.edits if not edit.write.aside]
    lowest = _lowest(edits, table)
    streams = {(e.write.site.stack, e.write.site.layer): e.write.streams for e in edits
               if e.write.streams is not None}
    kept: Kept = {}
    for site in table:
        place = site.stack, site.layer
        if site.layer is None or place in streams or site.layer < lowest.get(site.stack, math.inf):
            continue
        gated = any(s.role == "ffn.gate" and (s.stack, s.layer) == place for s in table)
        for what, width in _of_backbone(site, gated=gated):
            kept[*place, what] = width * site.shared_by
    for edit in edits:
        place = edit.write.site.stack, edit.write.site.layer
        if place not in streams:
            _of_edit(edit, table, kept)
    return sum(kept.values()) + _of_streams(list(streams.values()), table)


def kept_weights(modules: tuple[ModulePlan, ...]) -> int:
    """Return how many elements of formed weights are kept, whatever the number of tokens."""
    sites = {(m.path, e.write.site.tensor, e.write.site.expert): e.write.site
             for m in modules for e in m.edits if e.formed and not e.write.aside}
    return sum(site.d_in * (site.rows.groups * site.rows.size if site.rows else site.d_out)
               for site in sites.values())


def _lowest(edits: list[EditPlan], table: SiteTable) -> dict[str, float]:
    """The lowest layer of each stack that the backward pass runs through."""
    found: dict[str, float] = {}
    for edit in edits:
        site = edit.write.site
        if edit.write.read is Port.HIDDEN_STATES:
            continue  # reads the layers; nothing below it learns
        if site.layer is None and "embedding" not in site.role:
            continue  # behind the layers
        layer = -1 if site.layer is None else site.layer
        found[site.stack] = min(found.get(site.stack, math.inf), layer)
    if "encoder" in found and "decoder" in table.layers:
        found["decoder"] = -1  # its cross-attention reads what the encoder's layers give
    return found


def _of_backbone(site: Site, *, gated: bool) -> Iterator[tuple[str, int]]:
    """What the frozen parts of a layer keep: attention its operands, norms and activations."""
    part, _, name = site.role.rpartition(".")
    if part in ("attention", "cross_attention"):
        yield site.role, site.d_in if name == "output" else site.d_out
    elif part == "norm":
        yield site.role, site.d_out
    elif site.role in ("ffn.up", "ffn.gate"):
        yield site.role, site.d_out
        if site.role == "ffn.gate" and gated:
            yield "activated", site.d_out  # a product keeps both of its factors


def _of_edit(edit: EditPlan, table: SiteTable, kept: Kept) -> None:
    write, site = edit.write, edit.write.site
    algebra = write.algebra
    untouched = algebra is not None and algebra.source and not edit.stage.on_weight
    if edit.stage is Stage.BIAS or untouched or site.kind is SiteKind.NORM:
        return  # a norm keeps what it reads anyway
    place = site.stack, site.layer
    if write.read is Port.HIDDEN_STATES:
        kept[*place, "states"] = (table.layers[site.stack] + 1) * site.d_out
    elif write.read in (Port.OUTPUT, Port.BOTH):
        kept[*place, f"{site.role} out"] = site.d_out
    if write.read in (Port.INPUT, Port.WEIGHT, Port.BOTH):
        kept[*place, _input_of(site.role)] = site.d_in
    streams = [step.primitive for step in edit.program.steps if not step.primitive.on_tensors]
    inner = sum(p.kept for p in streams) - (streams[-1].width if streams else 0)
    kept[*place, f"{write.label} {write.key}"] = max(inner, 0) * site.shared_by


def _input_of(role: str) -> str:
    """A name that sites have in common which read one tensor."""
    part, _, name = role.rpartition(".")
    if part == "attention" and name != "output":
        return "attention in"
    if part == "ffn" and name in ("up", "gate"):
        return "ffn in"
    return f"{role} in"


def _of_streams(layers: list[Streams], table: SiteTable) -> int:
    """Both streams where an input is kept, and of the last layer, from which inversion begins."""
    total = 0
    for each in layers:
        most = inversions(each)
        keeps = most < each.count and each.index % (most + 1) == 0
        total += 2 * table.hidden_size * (keeps or each.closes)
    return total

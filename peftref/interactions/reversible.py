"""Layers that run on two streams, so that their inputs follow from their outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from peftref.backbone.site_table import Site
from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.ir.types import SEAM, ReadNode, Streams, WriteNode
from peftref.registry import couplings
from peftref.spec.typology import InsertionForm, IntegrationKind, Port

__all__ = ["Reversible", "ReversibleArguments"]

_ADDS = (IntegrationKind.ADD, IntegrationKind.SCALED_ADD, IntegrationKind.GATED_ADD)


class ReversibleArguments(CouplingArguments):
    """How a layer is made of two functions.

    ``layer``: which of the two the frozen layer is, the other being what the members add at
    ``block``; ``halves``: attention is the first and the rest of the layer the second.
    ``first_scale``, ``second_scale``: of the streams, a and b. ``inversions``: layers in a row
    whose inputs are computed back in the backward pass; by default as many as rounding allows.
    """

    layer: Literal["first", "second", "halves"] = "first"
    first_scale: float = Field(default=0.1, gt=0.0)
    second_scale: float = Field(default=1.0, gt=0.0)
    inversions: int | None = Field(default=None, ge=0)


@couplings.register("reversible")
class Reversible(Coupling[ReversibleArguments]):
    """``y1 = a x1 + F(x2)``, ``y2 = b x2 + G(y1)`` in place of each layer; at the end the mean.

    One function is the layer with all that is edited inside of it, the other what the members add
    at role ``block``; the streams then change places, so that the layer sees what came out of the
    layer before. In ``halves`` both functions are the layer's, and the streams stay. Activations
    need not be kept: inputs are computed back from outputs. Liao, Tan and Monz 2023,
    https://arxiv.org/abs/2306.00477
    """

    name = "reversible"
    Arguments = ReversibleArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        blocks = [(a, w) for a, w in graph.writes(members) if w.site.role == "block"]
        if self.arguments.layer == "halves":
            if blocks:
                raise CompositionError(
                    f"reversible: {blocks[0][1].label}: in halves both functions are parts of the "
                    "layer; place members inside of it (attention, ffn), or take layer=first"
                )
            blocks = self._carriers(graph, members)
        self._check(graph, members, blocks)
        layers: dict[str, list[int]] = {}
        for _, write in blocks:
            layers.setdefault(write.site.stack, []).append(write.site.layer or 0)
        for address, write in blocks:
            graph.set(address, replace(write, streams=self._streams(write.site, layers)))
        return f"{sum(len(set(found)) for found in layers.values())} layers on two streams"

    def _streams(self, site: Site, layers: dict[str, list[int]]) -> Streams:
        found, a = sorted(set(layers[site.stack])), self.arguments
        if found[-1] - found[0] >= len(found):
            raise CompositionError(
                f"reversible: the streams run through layers in a row; found {found} of the "
                f"{site.stack}"
            )
        return Streams(
            a.layer, (a.first_scale, a.second_scale), a.layer != "halves", site.stack,
            (site.layer or 0) - found[0], len(found), a.inversions,
        )

    @staticmethod
    def _carriers(
        graph: AdapterGraph, members: tuple[str, ...]
    ) -> list[tuple[int, WriteNode]]:
        """A write at each layer that the members edit, though they add nothing to it as a whole."""
        edited = {(w.site.stack, w.site.layer): w for _, w in graph.writes(members)}
        found: list[tuple[int, WriteNode]] = []
        for site in graph.table:
            place = site.stack, site.layer
            if site.role != "block" or place not in edited:
                continue
            first = edited[place]
            write = WriteNode(
                first.member, first.module, site, Port.OUTPUT, Port.INPUT,
                InsertionForm.PARALLEL, IntegrationKind.ADD, None, first.order, (),
                f"{first.member}.streams",
            )
            found.append((graph.add(write, (graph.add(ReadNode(site, Port.INPUT)),)), write))
        return found

    def _check(
        self,
        graph: AdapterGraph,
        members: tuple[str, ...],
        blocks: list[tuple[int, WriteNode]],
    ) -> None:
        if not blocks:
            raise CompositionError(
                f"reversible: {', '.join(members)} adds nothing to a whole layer; name a member "
                "whose site is 'block', as residual_adapter(site=block)"
            )
        for _, write in blocks:
            if write.kind not in _ADDS or write.port is not Port.OUTPUT:
                raise CompositionError(
                    f"reversible: {write.label} joins port {write.port.value} by "
                    f"{write.kind.value}; the second function is what members add to the output"
                )
            if write.site.shared_by > 1:
                raise CompositionError(
                    f"reversible: {write.site.label} runs as {write.site.shared_by} layers, which "
                    "do not know where the streams begin and end"
                )
        places = {(write.site.stack, write.site.layer) for _, write in blocks}
        if self.arguments.layer == "halves":
            seams = {(s.stack, s.layer) for s in graph.table if s.role == SEAM}
            if graph.table.pre_norm or not places <= seams:
                raise CompositionError(
                    "reversible: only layers whose norms come behind the sums (BERT, RoBERTa, "
                    f"BART) have halves; this is a {graph.table.family} backbone: take "
                    "layer=first or layer=second"
                )
        for _, write in graph.writes():
            if write.read is Port.HIDDEN_STATES:
                raise CompositionError(
                    f"reversible: {write.label} reads the states of all layers, and layers on two "
                    "streams have none of that width"
                )

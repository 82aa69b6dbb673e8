"""Remove what has no effect."""

from __future__ import annotations

from dataclasses import dataclass

from peftref.ir.graph import AdapterGraph
from peftref.ir.types import OperationNode, ReadNode
from peftref.spec.typology import Port

__all__ = ["Simplify"]


@dataclass(frozen=True, slots=True)
class Simplify:
    """Case 1: an operation without tensors that is the identity (dropout of 0) is skipped.

    Case 2: reads of one port of one site are one node.
    Case 3: nodes that no write depends on are removed.
    """

    name: str = "simplify"

    def run(self, graph: AdapterGraph) -> str:
        skipped = 0
        for address, node in list(graph.of_type(OperationNode)):
            inputs = graph.inputs(address)
            algebra = node.primitive.algebra()
            bare = len(inputs) == 1 and not node.primitive.tensors()
            if bare and not node.primitive.on_tensors and algebra.identity_at_init:
                graph.redirect(address, inputs[0])
                graph.remove(address)
                skipped += 1
        merged = self._merge_reads(graph)
        return f"{skipped} operations skipped, {merged} reads shared, {graph.sweep()} nodes unused"

    @staticmethod
    def _merge_reads(graph: AdapterGraph) -> int:
        first: dict[tuple[str, Port], int] = {}
        merged = 0
        for address, node in list(graph.of_type(ReadNode)):
            kept = first.setdefault((node.site.label, node.port), address)
            if kept != address:
                graph.redirect(address, kept)
                graph.remove(address)
                merged += 1
        return merged


"""Remove what has no effect."""

from __future__ import annotations

from dataclasses import dataclass

from peftref.ir.graph import AdapterGraph
from peftref.ir.types import OperationNode

__all__ = ["Simplify"]


@dataclass(frozen=True, slots=True)
class Simplify:
    """Case 1: an operation without tensors that is the identity (dropout of 0) is skipped.

    Case 2: nodes that no write depends on are removed.
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
        return f"{skipped} operations skipped, {graph.sweep()} nodes unused"


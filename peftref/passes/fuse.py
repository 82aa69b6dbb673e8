"""Join operations that one kernel can do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftref.ir.graph import AdapterGraph
from peftref.ir.types import Form, OperationNode, WriteNode
from peftref.spec.typology import IntegrationKind

__all__ = ["Fuse"]

_ADDS = (IntegrationKind.ADD, IntegrationKind.SCALED_ADD)


@dataclass(frozen=True, slots=True)
class Fuse:
    """Case 1: product, scale and sum at the end of a function become one, ``y + s h B^T``.

    The stream that it adds to must be whole, no slice. It saves two passes over a tensor of the
    output's size, forward and backward.
    """

    name: str = "fuse"

    def run(self, graph: AdapterGraph) -> str:
        fused = 0
        for address, write in graph.writes():
            if self._accumulates(graph, address, write):
                graph.set(address, replace(write, accumulates=True))
                fused += 1
        return f"{fused} products accumulate into the stream"

    @staticmethod
    def _accumulates(graph: AdapterGraph, address: int, write: WriteNode) -> bool:
        (value,) = graph.inputs(address)
        node = graph.node(value)
        formed = write.form is Form.FORMED
        adds = write.kind in _ADDS and write.site.rows is None
        adds = adds and not formed and not write.needs_matrix
        return adds and isinstance(node, OperationNode) and node.primitive.is_product

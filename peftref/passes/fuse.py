"""Join operations that one kernel can do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftref.ir.graph import AdapterGraph
from peftref.ir.pattern import chain_of, match
from peftref.ir.types import Form, OperationNode, Stage, WriteNode
from peftref.spec.typology import IntegrationKind

__all__ = ["Fuse"]

_ADDS = (IntegrationKind.ADD, IntegrationKind.SCALED_ADD)

_ONE_STREAM = {
    "attention.query": "attention",
    "attention.key": "attention",
    "attention.value": "attention",
    "cross_attention.key": "cross_attention",
    "cross_attention.value": "cross_attention",
    "ffn.gate": "ffn",
    "ffn.up": "ffn",
}
"""Roles whose modules read one stream, by what they belong to."""


@dataclass(frozen=True, slots=True)
class Fuse:
    """Case 1: a function and its integration are one op (the table of ``ir/pattern.py``).

    Case 2: what the ops of one weight cannot do together is left to plain operations: the norm of
    a weight needs low-rank additions only, and no rotation.
    Case 3: low-rank additions to linears of one layer that read one stream (query, key and value,
    gate and up) are one op.
    Case 4: product, scale and sum at the end of a function become one, ``y + s h B^T``. The stream
    that it adds to must be whole, no slice. It saves two passes over a tensor of the output's
    size, forward and backward.
    """

    ops: bool = True
    accumulate: bool = True
    name: str = "fuse"

    def run(self, graph: AdapterGraph) -> str:
        fused: dict[str, int] = {}
        modules: dict[str, list[tuple[int, WriteNode]]] = {}
        for address, write in graph.writes():
            op = ""
            if self.ops and write.form is not Form.FORMED:
                op = match(write, chain_of(graph, address))
            sums = self.accumulate and self._accumulates(graph, address, write)
            write = replace(write, op=op, accumulates=sums)
            graph.set(address, write)
            modules.setdefault(write.path, []).append((address, write))
        for writes in modules.values():
            for address, write in self._together(writes):
                graph.set(address, write)
        self._group(graph)
        for _, write in graph.writes():
            fused[write.op] = fused.get(write.op, 0) + 1
        told = [f"{number} {op}" for op, number in sorted(fused.items()) if op]
        return ", ".join(told) or "no ops"

    @staticmethod
    def _together(writes: list[tuple[int, WriteNode]]) -> list[tuple[int, WriteNode]]:
        """The writes of a module whose op does not go with the others."""
        weights = [(a, w) for a, w in writes if w.stage is not None and w.stage.on_weight]
        norms = [(a, w) for a, w in weights if w.stage is Stage.WEIGHT_NORM]
        if not norms:
            return []
        others = [w for _, w in weights if w.stage is not Stage.WEIGHT_NORM]
        if len(norms) == 1 and all(w.op == "lora_linear" for w in others) and others:
            return []
        return [(a, replace(w, op="")) for a, w in norms]

    @staticmethod
    def _group(graph: AdapterGraph) -> None:
        """Name the groups; whether tensors really are one is seen when they run."""
        found: dict[str, list[tuple[int, WriteNode]]] = {}
        for address, write in graph.writes():
            site = write.site
            reads = _ONE_STREAM.get(site.role)
            if write.op == "lora_linear" and reads is not None and site.layer is not None:
                name = f"{site.stack}.{site.layer}.{reads}"
                found.setdefault(name, []).append((address, write))
        for name, writes in found.items():
            if len({write.path for _, write in writes}) > 1:
                for address, write in writes:
                    graph.set(address, replace(write, group=name))

    @staticmethod
    def _accumulates(graph: AdapterGraph, address: int, write: WriteNode) -> bool:
        node = graph.node(graph.value(address))
        formed = write.form is Form.FORMED
        adds = write.kind in _ADDS and write.site.rows is None and not write.gated
        adds = adds and not formed and not write.needs_matrix
        return adds and isinstance(node, OperationNode) and node.primitive.is_product

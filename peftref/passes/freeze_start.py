"""Functions that are read twice: with their tensors, and with those tensors' first values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftref.ir.graph import AdapterGraph
from peftref.ir.types import OperationNode, TensorNode

__all__ = ["FreezeStart"]


@dataclass(frozen=True, slots=True)
class FreezeStart:
    """Case 1: an operation that reads its input's start gets a copy of that input.

    In the copy every trained tensor is a frozen one that keeps its first values; masks, routes
    and what is frozen anyway are the same nodes in both, so that couplings act on both alike.
    """

    name: str = "freeze starts"

    def run(self, graph: AdapterGraph) -> str:
        copies: dict[int, int] = {}
        for address, node in list(graph.of_type(OperationNode)):
            inputs = graph.inputs(address)
            if node.primitive.reads_start and len(inputs) == 1:
                graph.set_inputs(address, (*inputs, self._copy(graph, inputs[0], copies)))
        frozen = sum(isinstance(graph.node(a), TensorNode) for a, b in copies.items() if a != b)
        return f"{frozen} tensors kept as they start"

    def _copy(self, graph: AdapterGraph, address: int, copies: dict[int, int]) -> int:
        if address not in copies:
            copies[address] = self._made(graph, address, copies)
        return copies[address]

    def _made(self, graph: AdapterGraph, address: int, copies: dict[int, int]) -> int:
        node = graph.node(address)
        if isinstance(node, TensorNode):
            return graph.add(_start(node)) if node.spec.trainable else address
        if not isinstance(node, OperationNode):
            return address
        drawn = node.primitive.on_tensors and node.primitive.algebra().random
        inputs = graph.inputs(address)
        copied = inputs if drawn else tuple(self._copy(graph, i, copies) for i in inputs)
        return address if copied == inputs else graph.add(node, copied)


def _start(node: TensorNode) -> TensorNode:
    name = f"start.{node.spec.name}"
    spec = replace(node.spec, name=name, trainable=False, buffer=True, start_of=node.key)
    return replace(node, spec=spec, key=f"{node.key.removesuffix(node.spec.name)}{name}")

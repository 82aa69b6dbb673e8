"""The adapter graph: which tensors are read, what is computed, where it is written.

The only file that knows how networkx stores it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TypeVar

import networkx as nx

from peftref.backbone.site_table import SiteTable
from peftref.ir.types import Node, OperationNode, ReadNode, TensorNode, WriteNode
from peftref.spec.composition import CompositionSpec
from peftref.spec.technique import ProcedureSpec

__all__ = ["AdapterGraph"]

N = TypeVar("N")


class AdapterGraph:
    """A directed acyclic graph of reads, operations, tensors and writes.

    Nodes are addressed by integers in order of creation; the inputs of a node are ordered.
    ``procedures`` collects what couplings ask of training.
    """

    def __init__(self, composition: CompositionSpec, table: SiteTable) -> None:
        self.composition = composition
        self.table = table
        self._graph: nx.MultiDiGraph[int] = nx.MultiDiGraph()
        self.procedures: list[ProcedureSpec] = []
        self._next = 0

    def add(self, node: Node, inputs: tuple[int, ...] = ()) -> int:
        """Add a node that reads ``inputs`` in that order; return its address."""
        address = self._next
        self._next += 1
        self._graph.add_node(address, node=node)
        self._connect(address, inputs)
        return address

    def _connect(self, address: int, inputs: tuple[int, ...]) -> None:
        for index, source in enumerate(inputs):
            self._graph.add_edge(source, address, index=index)

    def node(self, address: int) -> Node:
        """The node at an address."""
        return self._graph.nodes[address]["node"]

    def set(self, address: int, node: Node) -> None:
        """Replace the node at an address; its edges stay."""
        self._graph.nodes[address]["node"] = node

    def inputs(self, address: int) -> tuple[int, ...]:
        """Addresses that a node reads, in order."""
        sources = self._graph.pred[address]
        edges = [(e["index"], source) for source, held in sources.items() for e in held.values()]
        return tuple(source for _, source in sorted(edges))

    def set_inputs(self, address: int, inputs: tuple[int, ...]) -> None:
        """Make a node read ``inputs`` instead of what it read."""
        self._graph.remove_edges_from(list(self._graph.in_edges(address, keys=True)))
        self._connect(address, inputs)

    def value(self, address: int) -> int:
        """What a write joins to its stream: its first input."""
        return self.inputs(address)[0]

    def gate(self, address: int) -> int | None:
        """What scales the change that a write makes: its second input, where it has one."""
        inputs = self.inputs(address)
        return inputs[1] if len(inputs) > 1 else None

    def users(self, address: int) -> tuple[int, ...]:
        """Addresses of the nodes that read this one."""
        return tuple(sorted(self._graph.successors(address)))

    def redirect(self, old: int, new: int) -> None:
        """Let every user of ``old`` read ``new``, at the same place."""
        for user in self.users(old):
            swapped = tuple(new if i == old else i for i in self.inputs(user))
            self.set_inputs(user, swapped)

    def remove(self, address: int) -> None:
        """Remove a node and its edges."""
        self._graph.remove_node(address)

    def of_type(self, kind: type[N]) -> Iterator[tuple[int, N]]:
        """All nodes of a kind, in order of creation."""
        for address in sorted(self._graph.nodes):
            node = self.node(address)
            if isinstance(node, kind):
                yield address, node

    def writes(self, members: tuple[str, ...] = ()) -> list[tuple[int, WriteNode]]:
        """All writes, or those of the named members, in order of creation."""
        return [(a, w) for a, w in self.of_type(WriteNode) if not members or w.member in members]

    def ancestors(self, address: int) -> list[int]:
        """All that a node depends on and itself, in an order in which they can be computed."""
        # networkx's sort of a view of the graph takes ten times as long, and this runs often.
        read: dict[int, set[int]] = {}
        stack = [address]
        while stack:
            node = stack.pop()
            if node not in read:
                read[node] = set(self._graph.pred[node])
                stack.extend(read[node])
        users: dict[int, list[int]] = {node: [] for node in read}
        for node, sources in read.items():
            for source in sources:
                users[source].append(node)
        waiting = {node: len(sources) for node, sources in read.items()}
        ready = [node for node, count in waiting.items() if not count]
        heapq.heapify(ready)
        order: list[int] = []
        while ready:
            node = heapq.heappop(ready)
            order.append(node)
            for user in users[node]:
                waiting[user] -= 1
                if not waiting[user]:
                    heapq.heappush(ready, user)
        return order

    def tensors_of(self, address: int) -> list[tuple[int, TensorNode]]:
        """The tensors that a write depends on."""
        found = ((a, self.node(a)) for a in self.ancestors(address))
        return [(a, n) for a, n in found if isinstance(n, TensorNode)]

    def reads_of(self, address: int) -> list[int]:
        """Addresses of the reads that a write depends on."""
        return [a for a in self.ancestors(address) if isinstance(self.node(a), ReadNode)]

    def operations_of(self, address: int) -> list[tuple[int, OperationNode]]:
        """The operations that a write depends on, in order."""
        found = ((a, self.node(a)) for a in self.ancestors(address))
        return [(a, n) for a, n in found if isinstance(n, OperationNode)]

    def sweep(self) -> int:
        """Remove what no write depends on; return how many nodes went."""
        used: set[int] = set()
        for address, _ in self.writes():
            used |= set(nx.ancestors(self._graph, address)) | {address}
        gone = [address for address in self._graph.nodes if address not in used]
        self._graph.remove_nodes_from(gone)
        return len(gone)

    def __len__(self) -> int:
        return len(self._graph)

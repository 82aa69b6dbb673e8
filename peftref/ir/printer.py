"""The graph as text, as it stands between two passes."""

from __future__ import annotations

from collections.abc import Collection

from peftref.ir.graph import AdapterGraph
from peftref.ir.types import (
    FunctionNode,
    Node,
    OperationNode,
    ReadNode,
    TensorNode,
    WriteNode,
)

__all__ = ["first_sites", "print_graph"]


def first_sites(graph: AdapterGraph) -> frozenset[str]:
    """Return the label of the first site of each role that a module writes."""
    first: dict[tuple[str, str, str], str] = {}
    for _, write in graph.writes():
        first.setdefault((write.member, write.module, write.site.role), write.site.label)
    return frozenset(first.values())


def print_graph(graph: AdapterGraph, sites: Collection[str] | None = None) -> str:
    """Return one line a node, each write after all that it depends on.

    Args:
        graph: the graph.
        sites: labels of the sites to print, such as ``decoder.0.attention.query``; None: all.
    """
    names: dict[int, str] = {}
    lines: list[str] = []
    for address, write in graph.writes():
        if sites is not None and write.site.label not in sites:
            continue
        for ancestor in graph.ancestors(address):
            if ancestor in names:
                continue
            names[ancestor] = f"%{len(names)}"
            inputs = ", ".join(names[i] for i in graph.inputs(ancestor))
            lines.append(f"{names[ancestor]} = {_describe(graph.node(ancestor))}({inputs})")
    return "\n".join(lines)


def _describe(node: Node) -> str:
    match node:
        case ReadNode():
            return f"read {node.site.label}.{node.port.value}:{node.width} "
        case FunctionNode():
            return f"function {node.expression.name}"
        case TensorNode():
            shape = "x".join(map(str, node.spec.shape))
            frozen = "" if node.spec.trainable else " frozen"
            shared = " shared" if node.spec.share is not None else ""
            return f"tensor {node.spec.name} {shape} {node.spec.init}{frozen}{shared} "
        case OperationNode():
            return f"{node.primitive.name}:{node.width} "
        case WriteNode():
            return _describe_write(node)


def _describe_write(write: WriteNode) -> str:
    scale = "" if write.scale is None else f" {write.scale:g}"
    derived = [] if write.stage is None else [write.stage.name.lower()]
    derived += [] if write.form is None else [write.form.name.lower()]
    derived += ["accumulates"] if write.accumulates else []
    what = f"{write.insertion.value} {write.kind.value}{scale}"
    tail = f" [{', '.join(derived)}]" if derived else ""
    return f"write {write.label}.{write.port.value} {what}{tail} "

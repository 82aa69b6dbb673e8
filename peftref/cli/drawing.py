"""The adapter graph as a picture: Graphviz text, Mermaid text or SVG.

Sites that are adapted alike are drawn once, with their number. The SVG is laid out here, a band
for each write, because the usual layout programs are not Python packages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from peftref.errors import SpecError
from peftref.ir.graph import AdapterGraph
from peftref.ir.types import FunctionNode, Node, OperationNode, ReadNode, TensorNode, WriteNode

__all__ = ["Box", "Picture", "draw", "picture_of"]

FILL = {
    "read": "#dbeafe",
    "operation": "#f3f4f6",
    "trained": "#dcfce7",
    "frozen": "#ffffff",
    "write": "#fde68a",
}
CHARACTER, LINE, GAP_X, GAP_Y, PAD = 7.3, 16, 24, 36, 8


@dataclass(frozen=True, slots=True)
class Box:
    """One node as it is drawn."""

    lines: tuple[str, ...]
    kind: str

    @property
    def width(self) -> float:
        """Width in pixels of a 12 px monospaced text with its padding."""
        return max(len(line) for line in self.lines) * CHARACTER + 2 * PAD

    @property
    def height(self) -> float:
        """Height in pixels."""
        return len(self.lines) * LINE + 2 * PAD


@dataclass(slots=True)
class Picture:
    """Boxes by address, in an order in which they can be computed, and arrows between them."""

    boxes: dict[int, Box] = field(default_factory=dict)
    arrows: list[tuple[int, int]] = field(default_factory=list)


def draw(graph: AdapterGraph, path: Path) -> None:
    """Write a picture of the graph; the suffix of the path says in which format.

    Raises:
        SpecError: the suffix is none of those known, or the file cannot be written.
    """
    writers = {".svg": _svg, ".dot": _dot, ".mmd": _mermaid}
    if path.suffix not in writers:
        raise SpecError(f"A graph is written as {', '.join(writers)}, not {path.suffix or path}.")
    try:
        path.write_text(writers[path.suffix](picture_of(graph)), encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be written ({error.strerror})") from error


def picture_of(graph: AdapterGraph) -> Picture:
    """Return what to draw: one write, with all that it depends on, for all sites alike."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for address, write in graph.writes():
        shape = (write.site.d_in, write.site.d_out, write.stage, write.form)
        steps = tuple(_steps(graph, address))
        key = (write.member, write.module, write.site.stack, write.site.role, shape, steps)
        groups.setdefault(key, []).append(address)
    picture = Picture()
    for first, *others in groups.values():
        for address in graph.ancestors(first):
            if address in picture.boxes:
                continue
            sites = 1 + len(others) if address == first else 0
            picture.boxes[address] = _box(graph.node(address), sites)
            picture.arrows += [(source, address) for source in graph.inputs(address)]
    return picture


def _steps(graph: AdapterGraph, address: int) -> Iterable[object]:
    for _, operation in graph.operations_of(address):
        yield operation.primitive.label, operation.width
    for _, tensor in graph.tensors_of(address):
        yield tensor.spec.name, tensor.spec.shape


def _box(node: Node, sites: int) -> Box:
    if isinstance(node, ReadNode):
        return Box((f"{node.site.role}.{node.port}", f"width {node.width}"), "read")
    if isinstance(node, FunctionNode):
        return Box((node.expression.name,), "operation")
    if isinstance(node, OperationNode):
        name, label = node.primitive.name, node.primitive.label
        title = name if name == label else f"{label}: {name}"
        return Box((title, f"width {node.width}"), "operation")
    if isinstance(node, TensorNode):
        shape = " x ".join(map(str, node.spec.shape)) or "scalar"
        kind = "trained" if node.spec.trainable else "frozen"
        return Box((node.spec.name, shape, kind), kind)
    return _write_box(node, sites)


def _write_box(node: WriteNode, sites: int) -> Box:
    scale = "" if node.scale is None else f" x {node.scale:g}"
    places = f"{sites} sites, {node.insertion}" if sites > 1 else f"{node.site.label}"
    target = f"{node.kind}{scale} -> {node.site.role}.{node.port}"
    return Box((f"{node.member}.{node.module}", target, places), "write")


def _dot(picture: Picture) -> str:
    node = '  node [shape=box, style=filled, fontname="monospace"];'
    lines = ["digraph adapter {", "  rankdir=LR;", node]
    for address, box in picture.boxes.items():
        text = "\\n".join(line.replace('"', r"\"") for line in box.lines)
        style = ', style="filled,dashed"' if box.kind == "frozen" else ""
        lines.append(f'  n{address} [label="{text}", fillcolor="{FILL[box.kind]}"{style}];')
    lines += [f"  n{source} -> n{target};" for source, target in picture.arrows]
    return "\n".join([*lines, "}", ""])


def _mermaid(picture: Picture) -> str:
    lines = ["flowchart LR"]
    for address, box in picture.boxes.items():
        text = "<br/>".join(escape(line) for line in box.lines)
        lines.append(f'  n{address}["{text}"]:::{box.kind}')
    lines += [f"  n{source} --> n{target}" for source, target in picture.arrows]
    lines += [f"  classDef {kind} fill:{fill},stroke:#374151" for kind, fill in FILL.items()]
    return "\n".join([*lines, ""])


def _svg(picture: Picture) -> str:
    centres, width, height = _layout(picture)
    parts = [
        (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="monospace" font-size="12">'),
        ('<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="#374151"/></marker></defs>'),
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for source, target in picture.arrows:
        (x1, y1), (x2, y2) = centres[source], centres[target]
        start, end = x1 + picture.boxes[source].width / 2, x2 - picture.boxes[target].width / 2
        bend = (start + end) / 2
        parts.append(
            f'<path d="M{start:.1f} {y1:.1f} C{bend:.1f} {y1:.1f} {bend:.1f} {y2:.1f} '
            f'{end:.1f} {y2:.1f}" fill="none" stroke="#374151" marker-end="url(#end)"/>'
        )
    for address, box in picture.boxes.items():
        parts += _svg_box(box, *centres[address])
    return "\n".join([*parts, "</svg>", ""])


def _svg_box(box: Box, x: float, y: float) -> list[str]:
    left, top = x - box.width / 2, y - box.height / 2
    dash = ' stroke-dasharray="4 3"' if box.kind == "frozen" else ""
    parts = [
        (f'<rect x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'rx="4" fill="{FILL[box.kind]}" stroke="#374151"{dash}/>')
    ]
    for index, line in enumerate(box.lines):
        base = top + PAD + LINE * index + 12
        parts.append(f'<text x="{x:.1f}" y="{base:.1f}" text-anchor="middle">{escape(line)}</text>')
    return parts


def _layout(picture: Picture) -> tuple[dict[int, tuple[float, float]], float, float]:
    """Return the centre of every box, and the size of the picture.

    A band for each write, from left to right by longest path; what several writes read stands in
    the band of the first.
    """
    rank = _ranks(picture)
    count = max(rank.values(), default=-1) + 1
    widest = [
        max(box.width for address, box in picture.boxes.items() if rank[address] == column)
        for column in range(count)
    ]
    left = [sum(widest[:column]) + GAP_X * (2 * column + 1) for column in range(count)]
    centres: dict[int, tuple[float, float]] = {}
    y = float(GAP_Y)
    for band in _bands(picture):
        columns: dict[int, list[int]] = {}
        for address in band:
            columns.setdefault(rank[address], []).append(address)
        stacks = {c: sum(picture.boxes[a].height + GAP_X for a in b) for c, b in columns.items()}
        tallest = max(stacks.values())
        for column, addresses in columns.items():
            top = y + (tallest - stacks[column]) / 2
            for address in addresses:
                box = picture.boxes[address]
                centres[address] = (left[column] + widest[column] / 2, top + box.height / 2)
                top += box.height + GAP_X
        y += tallest + GAP_Y
    width = (left[-1] + widest[-1] if count else 0.0) + GAP_X
    return centres, width, y


def _bands(picture: Picture) -> list[list[int]]:
    """Return the addresses of each write with what it alone, or it first, depends on."""
    bands: list[list[int]] = [[]]
    for address, box in picture.boxes.items():  # in an order in which they can be computed
        bands[-1].append(address)
        if box.kind == "write":
            bands.append([])
    return [band for band in bands if band]


def _ranks(picture: Picture) -> dict[int, int]:
    """Return the column of each box: longest path from a source, tensors before their user."""
    inputs: dict[int, list[int]] = {address: [] for address in picture.boxes}
    for source, target in picture.arrows:
        inputs[target].append(source)
    rank: dict[int, int] = {}
    for address in picture.boxes:
        rank[address] = max((rank[source] + 1 for source in inputs[address]), default=0)
    last = max(rank.values(), default=0)
    for address, box in picture.boxes.items():
        if box.kind == "write":
            rank[address] = last
    for address, box in picture.boxes.items():
        if not inputs[address] and box.kind in {"trained", "frozen"}:
            users = [rank[target] for source, target in picture.arrows if source == address]
            rank[address] = max(min(users) - 1, 0)
    return rank

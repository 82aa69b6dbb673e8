"""Tensors that several sites share get one owner."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftref.errors import CompositionError
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import Algebra, Arguments, Operation, Place, Primitive, Runtime
from peftref.ir.types import OperationNode, TensorNode

__all__ = ["LeadingCorner", "TieParameters"]


class LeadingCorner(Primitive[Arguments]):
    """The leading ``shape`` of a larger shared tensor (VeRA's projections)."""

    name = "leading_corner"
    on_tensors = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(Arguments(), Place(0, 0, 0))
        self.shape = shape

    def algebra(self) -> Algebra:
        return Algebra()

    def bind(self, runtime: Runtime) -> Operation:
        window = tuple(slice(0, extent) for extent in self.shape)
        return lambda tensor: tensor[window]


def _group(node: TensorNode) -> str:
    """Modules have groups of their own; one that begins with ``@`` is the whole technique's."""
    share = node.spec.share or ""
    return share[1:] if share.startswith("@") else f"{node.module}.{share}"


@dataclass(frozen=True, slots=True)
class TieParameters:
    """Case 1: equal shapes: all users read one tensor, owned by the root.

    Case 2: unequal shapes of a tensor that may be sliced: the largest is owned, users take a
    corner.
    Case 3: unequal shapes otherwise, or a tensor that starts at backbone values: refused.
    """

    name: str = "tie parameters"

    def run(self, graph: AdapterGraph) -> str:
        groups: dict[str, list[tuple[int, TensorNode]]] = {}
        for address, node in graph.of_type(TensorNode):
            if node.spec.share is not None:
                owner = f"{node.member}.{_group(node)}.{node.spec.name}"
                groups.setdefault(owner, []).append((address, node))
        for owner, users in groups.items():
            self._tie(graph, owner, users)
        return f"{len(groups)} owners for {sum(map(len, groups.values()))} uses"

    @staticmethod
    def _tie(graph: AdapterGraph, owner: str, users: list[tuple[int, TensorNode]]) -> None:
        first = users[0][1]
        if first.spec.from_backbone:
            raise CompositionError(
                f"{first.member}.{first.module}: tensor {first.spec.name!r} starts at values of "
                f"the backbone at its own site ({first.spec.init}), so that sites cannot share "
                "it; share other tensors"
            )
        shapes = {node.spec.shape for _, node in users}
        shape = first.spec.shape
        if len(shapes) > 1:
            if not first.spec.sliced:
                raise CompositionError(
                    f"{first.member}.{first.module}: tensor {first.spec.name!r} is shared by "
                    f"sites of unequal shapes {', '.join(map(str, sorted(shapes)))}; select "
                    "sites of one width, or share by role"
                )
            shape = tuple(max(extents) for extents in zip(*shapes, strict=True))
        spec = replace(first.spec, shape=shape)
        tied = graph.add(replace(first, spec=spec, key=owner))
        for address, node in users:
            source = tied
            if node.spec.shape != shape:
                source = graph.add(OperationNode(LeadingCorner(node.spec.shape)), (tied,))
            graph.redirect(address, source)
            graph.remove(address)

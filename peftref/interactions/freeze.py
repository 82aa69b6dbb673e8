"""Members whose tensors stay as they are."""

from __future__ import annotations

from dataclasses import replace

from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.registry import couplings

__all__ = ["Freeze", "FreezeArguments"]


class FreezeArguments(CouplingArguments):
    """``aside``: the members take no part in a forward until a procedure asks for them."""

    aside: bool = False


@couplings.register("freeze")
class Freeze(Coupling[FreezeArguments]):
    """The members' tensors do not train; they are saved with the others.

    For members whose values come from somewhere else (the procedure ``start_from``): the source
    prompts of ATTEMPT, or a teacher that is set aside.
    """

    name = "freeze"
    Arguments = FreezeArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        count = 0
        for address, write in graph.writes(members):
            if self.arguments.aside:
                graph.set(address, replace(write, aside=True))
            for tensor, node in graph.tensors_of(address):
                if node.spec.trainable and node.member in members:
                    spec = replace(node.spec, trainable=False, buffer=True)
                    graph.set(tensor, replace(node, spec=spec))
                    count += 1
        if not count:
            raise CompositionError(f"freeze: {', '.join(members)} has no trained tensor")
        return f"{count} tensors frozen"

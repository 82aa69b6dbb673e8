"""Members that take no part in a forward, and train by the losses of procedures."""

from __future__ import annotations

from dataclasses import replace

from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.registry import couplings

__all__ = ["SetAside"]


@couplings.register("set_aside")
class SetAside(Coupling[CouplingArguments]):
    """The members' edits do not act; their tensors train, where a procedure's loss reads them.

    A decoder that only shapes what another member learns (``reconstruct``). For members that
    do not train, see ``freeze`` with ``aside``.
    """

    name = "set_aside"
    Arguments = CouplingArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        writes = list(graph.writes(members))
        if not writes:
            raise CompositionError(f"set_aside: {', '.join(members)} writes nowhere")
        for address, write in writes:
            graph.set(address, replace(write, aside=True))
        return f"{len(writes)} edits set aside"

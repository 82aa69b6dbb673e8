"""One tensor for several insertions of any technique."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.registry import couplings

__all__ = ["Share", "ShareArguments"]


class ShareArguments(CouplingArguments):
    """``tensors``: globs of tensor names; ``by``: one tensor a role, or one in all."""

    tensors: tuple[str, ...] = ("*",)
    by: Literal["role", "all"] = "role"


@couplings.register("share")
class Share(Coupling[ShareArguments]):
    """The named tensors of the members have one owner; equal shapes are required.

    ShareLoRA, Song et al. 2024, https://arxiv.org/abs/2406.10785
    """

    name = "share"
    Arguments = ShareArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        used: set[str] = set()
        count = 0
        for write_address, write in graph.writes(members):
            for address, node in graph.tensors_of(write_address):
                hits = [g for g in self.arguments.tensors if fnmatchcase(node.spec.name, g)]
                if not hits or node.spec.share is not None:
                    continue
                used.update(hits)
                group = write.site.role if self.arguments.by == "role" else "all"
                graph.set(address, replace(node, spec=replace(node.spec, share=group)))
                count += 1
        unused = [glob for glob in self.arguments.tensors if glob not in used]
        if unused:
            raise CompositionError(
                f"share: {unused[0]!r} matches no tensor of {', '.join(members)}"
            )
        return f"{count} tensors shared"

"""The weights that any technique edits, as they are once stored in few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from peftref.backbone.site_table import SiteKind
from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import Place
from peftref.ir.types import OperationNode, ReadNode, WriteNode
from peftref.registry import couplings, primitives
from peftref.spec.typology import InsertionForm, IntegrationKind, Port

__all__ = ["Quantize", "QuantizeArguments"]


class QuantizeArguments(CouplingArguments):
    """As those of the primitive ``quantise``."""

    kind: Literal["nf4", "int"] = "nf4"
    bits: int = Field(default=4, ge=2, le=8)
    block: int = Field(default=64, gt=1)


@couplings.register("quantize")
class Quantize(Coupling[QuantizeArguments]):
    """The weight of every linear that a member edits is quantised before all other edits.

    QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314
    """

    name = "quantize"
    Arguments = QuantizeArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        done: set[tuple[str, object]] = set()
        for _, write in graph.writes(members):
            place = write.path, write.site.rows
            if write.site.kind is SiteKind.LINEAR and place not in done:
                self._add(graph, write)
                done.add(place)
        if not done:
            raise CompositionError(
                f"quantize: {', '.join(members)} edits no linear module, so there is no weight "
                "to quantise"
            )
        return f"{len(done)} weights quantised"

    def _add(self, graph: AdapterGraph, write: WriteNode) -> None:
        site, kind = write.site, primitives.get("quantise")
        place = Place(site.d_in, site.d_out, graph.table.hidden_size, (site.d_out, site.d_in))
        arguments = kind.Arguments(**self.arguments.model_dump())
        read = graph.add(ReadNode(site, Port.INPUT))
        value = graph.add(OperationNode(kind(arguments, place)), (read,))
        base = replace(
            write, module="quantize", port=Port.WEIGHT, read=Port.INPUT, scale=None, after=(),
            insertion=InsertionForm.SEQUENTIAL, kind=IntegrationKind.REPLACE,
            key=f"{write.key}.quantize", positions=None, gated=False,
        )
        graph.add(base, (value,))

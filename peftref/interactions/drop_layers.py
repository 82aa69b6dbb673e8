"""Adapters that are left out of the lower layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.gating import add_gate
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import (
    Algebra,
    Arguments,
    Operation,
    Place,
    Primitive,
    Runtime,
    TensorSpec,
)
from peftref.ir.types import OperationNode, ReadNode, TensorNode
from peftref.registry import couplings
from peftref.spec.technique import ProcedureSpec
from peftref.spec.typology import Port

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DropLayers", "DropLayersArguments", "OpenFrom"]

FIRST = "first_layer"


class DropLayersArguments(CouplingArguments):
    """``most``: at most so many of the lower layers go without (default: all but the last)."""

    most: int | None = Field(default=None, ge=1)


class OpenFrom(Primitive[Arguments]):
    """One in the layers from the first that is kept, zero below; all are kept outside training."""

    name = "open_from"

    def __init__(self, layer: int, place: Place) -> None:
        super().__init__(Arguments(), place)
        self.layer = layer

    @property
    def width(self) -> int:
        return 1

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(FIRST, (), "zeros", trainable=False, share="@drop", buffer=True),)

    def algebra(self) -> Algebra:
        return Algebra(random=True)

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        def gate(x: Tensor, first: Tensor) -> Tensor:
            if not runtime.training:
                return torch.ones_like(first)
            return (first <= self.layer).to(x.dtype)

        return gate


@couplings.register("drop_layers")
class DropLayers(Coupling[DropLayersArguments]):
    """Robust AdapterDrop over any technique: in each step the lowest ``k`` layers go without.

    ``k`` is uniform in 0 .. ``most``, one draw a step for all modules and micro-batches; outside
    training all layers take part, and leaving out any number of the lowest ones is what was
    trained for (parameter ``layers`` of the technique). Rueckle et al. 2021,
    https://arxiv.org/abs/2010.11918
    """

    name = "drop_layers"
    Arguments = DropLayersArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        writes = [(a, w) for a, w in graph.writes(members) if w.site.layer is not None]
        if not writes:
            raise CompositionError(f"drop_layers: {', '.join(members)} has no edit inside a layer")
        layers = max(graph.table.layers.values())
        most = layers - 1 if self.arguments.most is None else self.arguments.most
        if most >= layers:
            raise CompositionError(
                f"drop_layers: most is {most}, the backbone has {layers} layers; at most "
                f"{layers - 1} can be left out"
            )
        for address, write in writes:
            place = Place(1, 1, graph.table.hidden_size, stack=write.site.reads_stack)
            primitive = OpenFrom(write.site.layer or 0, place)
            port = Port.INPUT if write.read in (Port.WEIGHT, Port.BIAS) else write.read
            read = graph.add(ReadNode(write.site, port))
            (spec,) = primitive.tensors()
            key = f"{write.path}.{write.key}.{spec.name}"
            tensor = graph.add(TensorNode(spec, write.member, write.module, key))
            add_gate(graph, address, graph.add(OperationNode(primitive), (read, tensor)))
        arguments = {"members": ",".join(members), "most": most}
        graph.procedures.append(ProcedureSpec(name="drop_layers", arguments=arguments))
        return f"{len(writes)} edits may be left out, of up to {most} layers"

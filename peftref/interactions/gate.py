"""A gate per sample on what any technique writes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

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
from peftref.ir.types import OperationNode, ReadNode, TensorNode, WriteNode
from peftref.registry import couplings
from peftref.spec.typology import IntegrationKind, Port

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gate", "SampleGate"]


class SampleGate(Primitive[Arguments]):
    """``G(x) = mean over real tokens of sigmoid(x w + b)``: one number a sample.

    Padding is left out of the mean (published code counts it), so that a padded row equals the
    row alone. UniPELT, Mao et al. 2022, https://arxiv.org/abs/2110.07577
    """

    name = "sample_gate"

    @property
    def width(self) -> int:
        return 1

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("sample_gate.weight", (1, self.place.d_in), "normal(0.02)"),
            TensorSpec("sample_gate.bias", (1,), "zeros"),
        )

    def algebra(self) -> Algebra:
        return Algebra(mixes_tokens=True, per_sample=True)

    def flops(self) -> int:
        return 2 * self.place.d_in + self.place.d_out

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn.functional import linear

        stack = self.place.stack

        def gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            opened = torch.sigmoid(linear(x, weight, bias))
            if x.dim() <= 2:
                return opened
            mask = runtime.token_mask(stack)
            if mask is None:
                return opened.mean(-2, keepdim=True)
            real = mask.to(opened.dtype)[..., None]
            return (opened * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True)

        return gate


@couplings.register("gate")
class Gate(Coupling[CouplingArguments]):
    """Every change that the members make is scaled by a gate that reads what the member reads.

    A change is the difference that an edit makes to its stream, ``y + G (edit(y) - y)``, so that
    additions, scales, rotations, normalisations and biases are gated alike; the rows of a prefix
    are scaled themselves, as published.
    """

    name = "gate"

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        writes = graph.writes(members)
        gates: dict[tuple[str, str, Port], int] = {}
        for address, write in writes:
            if any(p.name == SampleGate.name for p in _gates(graph, address)):
                raise CompositionError(f"{write.label}: is gated already; one gate a member")
            port = Port.INPUT if write.read in (Port.WEIGHT, Port.BIAS) else write.read
            place = write.member, write.site.label, port
            if place not in gates:
                gates[place] = _sample_gate(graph, write, port)
            if write.kind in (IntegrationKind.ADD, IntegrationKind.SCALED_ADD):
                graph.set(address, replace(write, kind=IntegrationKind.GATED_ADD))
            add_gate(graph, address, gates[place])
        return f"{len(gates)} gates"


def _sample_gate(graph: AdapterGraph, write: WriteNode, port: Port) -> int:
    """The gate of all that one member writes at one site: what it changes there is one thing."""
    width = ReadNode(write.site, port).width
    place = Place(width, width, graph.table.hidden_size, stack=write.site.reads_stack)
    primitive = SampleGate(Arguments(), place)
    read = graph.add(ReadNode(write.site, port))
    tensors = tuple(
        graph.add(
            TensorNode(spec, write.member, write.module, f"{write.path}.{write.key}.{spec.name}")
        )
        for spec in primitive.tensors()
    )
    return graph.add(OperationNode(primitive), (read, *tensors))


def _gates(graph: AdapterGraph, address: int) -> list[Primitive[Arguments]]:
    gate = graph.gate(address)
    nodes = [] if gate is None else [graph.node(a) for a in graph.ancestors(gate)]
    return [node.primitive for node in nodes if isinstance(node, OperationNode)]

"""A gate per sample on what any technique writes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peftref.interactions.base import Coupling, CouplingArguments
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
from peftref.spec.typology import IntegrationKind, Port

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gate", "SampleGate"]


class SampleGate(Primitive[Arguments]):
    """``G(x) f``, ``G(x) = mean over real tokens of sigmoid(x w + b)``: one number a sample.

    Padding is left out of the mean (published code counts it), so that a padded row equals the
    row alone. UniPELT, Mao et al. 2022, https://arxiv.org/abs/2110.07577
    """

    name = "sample_gate"

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("gate.weight", (1, self.place.d_in), "normal(0.02)"),
            TensorSpec("gate.bias", (1,), "zeros"),
        )

    def algebra(self) -> Algebra:
        return Algebra(mixes_tokens=True, per_sample=True)

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        gated = inputs[0]
        return replace(
            gated, linear=False, matrix=False, diagonal=False, orthogonal=False,
            identity_at_init=False, mixes_tokens=True, per_sample=True,
        )

    def flops(self) -> int:
        return 2 * self.place.d_in + self.place.d_out

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn.functional import linear

        stack = self.place.stack

        def gate(value: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            open_ = torch.sigmoid(linear(x, weight, bias))
            if x.dim() > 2:
                mask = runtime.token_mask(stack)
                if mask is None:
                    open_ = open_.mean(-2, keepdim=True)
                else:
                    real = mask.to(open_.dtype)[..., None]
                    open_ = (open_ * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
            return open_ * value

        return gate


@couplings.register("gate")
class Gate(Coupling[CouplingArguments]):
    """Every write of the members is scaled by a gate that reads what the member reads."""

    name = "gate"

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        writes = graph.writes(members)
        for address, write in writes:
            (value,) = graph.inputs(address)
            read_port = Port.INPUT if write.read in (Port.WEIGHT, Port.BIAS) else write.read
            read = graph.add(ReadNode(write.site, read_port))
            node = graph.node(read)
            assert isinstance(node, ReadNode)
            width = write.site.d_in if write.port is Port.KEYS_VALUES else node.width
            value_node = graph.node(value)
            d_out = value_node.width if isinstance(value_node, OperationNode) else node.width
            place = Place(width, d_out, graph.table.hidden_size, stack=write.site.reads_stack)
            primitive = SampleGate(Arguments(), place)
            tensors = tuple(
                graph.add(
                    TensorNode(
                        spec, write.member, write.module, f"{write.path}.{write.key}.{spec.name}"
                    )
                )
                for spec in primitive.tensors()
            )
            gated = graph.add(OperationNode(primitive), (value, read, *tensors))
            graph.set_inputs(address, (gated,))
            if write.kind in (IntegrationKind.ADD, IntegrationKind.SCALED_ADD):
                graph.set(address, replace(write, kind=IntegrationKind.GATED_ADD))
        return f"{len(writes)} gates"

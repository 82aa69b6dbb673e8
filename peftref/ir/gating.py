"""Gates on the change that a write makes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import Algebra, Arguments, Operation, Place, Primitive, Runtime
from peftref.ir.types import OperationNode, WriteNode

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AtPositions", "BothGates", "add_gate"]


class BothGates(Primitive[Arguments]):
    """The product of two gates."""

    name = "both_gates"

    @property
    def width(self) -> int:
        return 1

    def algebra(self) -> Algebra:
        return Algebra()

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        return Algebra(
            per_sample=any(f.per_sample for f in inputs),
            mixes_tokens=any(f.mixes_tokens for f in inputs),
            random=any(f.random for f in inputs),
        )

    def bind(self, runtime: Runtime) -> Operation:
        return lambda first, second: first * second


class AtPositions(Primitive[Arguments]):
    """One at the tokens that a site's ``positions`` select, zero at all others."""

    name = "at_positions"

    def __init__(self, key: str, place: Place) -> None:
        super().__init__(Arguments(), place)
        self.key = key

    @property
    def width(self) -> int:
        return 1

    def algebra(self) -> Algebra:
        return Algebra(per_sample=True)

    def bind(self, runtime: Runtime) -> Operation:
        name = f"{self.place.stack}:{self.key}"

        def gate(x: Tensor) -> Tensor:
            mask = runtime.token_mask(name)
            if mask is None:
                raise TypeError(f"positions {name} of this call are not known")
            return mask.to(x.dtype)[..., None]

        return gate


def add_gate(graph: AdapterGraph, address: int, gate: int) -> None:
    """Let ``gate`` scale the change of the write at ``address``, beside gates it has already."""
    write, before = graph.node(address), graph.gate(address)
    assert isinstance(write, WriteNode)
    if before is not None:
        both = BothGates(Arguments(), Place(1, 1, graph.table.hidden_size))
        gate = graph.add(OperationNode(both), (before, gate))
    graph.set_inputs(address, (graph.value(address), gate))
    graph.set(address, replace(write, gated=True))

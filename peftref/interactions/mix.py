"""Copies of a module, one drawn at random in every forward, averaged afterwards."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import Algebra, Arguments, Operation, Place, Primitive, Runtime
from peftref.ir.types import OperationNode, TensorNode
from peftref.registry import couplings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mix", "MixArguments", "Route", "SelectCopy"]

_NOWHERE = Place(0, 0, 0)


class MixArguments(CouplingArguments):
    """``copies``: number of copies; ``share``: tensors (glob) of which there is one only."""

    copies: int = Field(default=4, gt=1)
    share: tuple[str, ...] = ()
    route: Literal["uniform"] = "uniform"


class Route(Primitive[Arguments]):
    """The copy that this forward uses; None, the average, outside training.

    Drawn from torch's generator: activation checkpointing replays it, so a recomputed forward
    takes the same route without any state of ours.
    """

    name = "route"
    on_tensors = True

    def algebra(self) -> Algebra:
        return Algebra(random=True)

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        def route(stack: Tensor) -> Tensor | None:
            if not runtime.training:
                return None
            return torch.randint(stack.shape[0], (1,), device=stack.device)

        return route  # pyright: ignore[reportReturnType]


class SelectCopy(Primitive[Arguments]):
    """``stack[route]``, or the mean over the copies."""

    name = "select_copy"
    on_tensors = True

    def algebra(self) -> Algebra:
        return Algebra()

    def bind(self, runtime: Runtime) -> Operation:
        def select(stack: Tensor, route: Tensor | None) -> Tensor:
            return stack.mean(0) if route is None else stack.index_select(0, route).squeeze(0)

        return select


@couplings.register("mix")
class Mix(Coupling[MixArguments]):
    """AdaMix over any technique: every primitive with tensors has ``copies`` of them.

    Each primitive draws its route apart from the others (down and up projections do not go
    together). Outside training the copies are averaged, which is what is merged and exported.
    Wang et al. 2022, https://arxiv.org/abs/2205.12410
    """

    name = "mix"
    Arguments = MixArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        shared: set[str] = set()
        copied = 0
        for write_address, _ in graph.writes(members):
            for address, node in graph.operations_of(write_address):
                if not node.primitive.on_tensors:
                    copied += self._copy(graph, address, members, shared)
        unknown = [name for name in self.arguments.share if name not in shared]
        if unknown:
            raise CompositionError(
                f"mix: share names {unknown[0]!r}, which is no tensor of {', '.join(members)}"
            )
        return f"{copied} tensors in {self.arguments.copies} copies"

    def _copy(
        self, graph: AdapterGraph, address: int, members: tuple[str, ...], shared: set[str]
    ) -> int:
        route: int | None = None
        inputs = list(graph.inputs(address))
        copied = 0
        for index, source in enumerate(inputs):
            node = graph.node(source)
            if isinstance(node, OperationNode) and node.primitive.on_tensors:
                raise CompositionError(
                    f"mix: a tensor of {', '.join(members)} is mixed or pruned already; "
                    "one mix for each member, inside of prune: prune(mix(...))"
                )
            if not isinstance(node, TensorNode) or not node.spec.trainable:
                continue
            hits = [g for g in self.arguments.share if fnmatchcase(node.spec.name, g)]
            if hits:
                shared.update(hits)
                continue
            m = self.arguments.copies
            spec = replace(node.spec, shape=(m, *node.spec.shape), stacked=m)
            graph.set(source, replace(node, spec=spec))
            if route is None:
                route = graph.add(OperationNode(Route(Arguments(), _NOWHERE)), (source,))
            select = OperationNode(SelectCopy(Arguments(), _NOWHERE))
            inputs[index] = graph.add(select, (source, route))
            copied += 1
        graph.set_inputs(address, tuple(inputs))
        return copied

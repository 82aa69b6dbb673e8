"""Copies of a module, one drawn at random in every forward, averaged afterwards."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftref.errors import CompositionError
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
from peftref.ir.types import OperationNode, TensorNode, WriteNode
from peftref.registry import couplings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mix", "MixArguments", "MixCopies", "Route", "SelectCopy", "SkillWeights"]

_NOWHERE = Place(0, 0, 0)


class MixArguments(CouplingArguments):
    """``copies``: number of copies; ``share``: tensors (glob) of which there is one only.

    ``route``: one copy at random (AdaMix), or a trained mixture (Poly).
    """

    copies: int = Field(default=4, gt=1)
    share: tuple[str, ...] = ()
    route: Literal["uniform", "skills"] = "uniform"


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


class SkillWeights(Primitive[Arguments]):
    """``w / sum w``, ``w`` relaxed Bernoulli draws of trained logits, or their sigmoids.

    Draws while training, at temperature one; sigmoids otherwise.
    """

    name = "skill_weights"
    on_tensors = True

    def algebra(self) -> Algebra:
        return Algebra(random=True)

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        def weights(logits: Tensor) -> Tensor:
            if runtime.training:
                least = torch.finfo(logits.dtype).eps
                logits = logits + torch.logit(torch.rand_like(logits), eps=least)
            open_ = torch.sigmoid(logits)
            return open_ / (open_.sum() + 1e-12)

        return weights


class MixCopies(Primitive[Arguments]):
    """``sum_m w_m stack_m``."""

    name = "mix_copies"
    on_tensors = True

    def algebra(self) -> Algebra:
        return Algebra()

    def bind(self, runtime: Runtime) -> Operation:
        import torch

        def mixed(stack: Tensor, weights: Tensor) -> Tensor:
            return torch.tensordot(weights, stack, 1)

        return mixed


@couplings.register("mix")
class Mix(Coupling[MixArguments]):
    """AdaMix over any technique: every primitive with tensors has ``copies`` of them.

    Each primitive draws its route apart from the others (down and up projections do not go
    together). Outside training the copies are averaged, which is what is merged and exported.
    With ``route="skills"`` one trained mixture of each insertion mixes the tensors before they are
    multiplied (Poly, Ponti et al. 2022, https://arxiv.org/abs/2202.13914).
    Wang et al. 2022, https://arxiv.org/abs/2205.12410
    """

    name = "mix"
    Arguments = MixArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        shared: set[str] = set()
        copied = 0
        for write_address, write in graph.writes(members):
            skills = self._skills(graph, write) if self.arguments.route == "skills" else None
            for address, node in graph.operations_of(write_address):
                if not node.primitive.on_tensors:
                    copied += self._copy(graph, address, members, shared, skills)
        unknown = [name for name in self.arguments.share if name not in shared]
        if unknown:
            raise CompositionError(
                f"mix: share names {unknown[0]!r}, which is no tensor of {', '.join(members)}"
            )
        return f"{copied} tensors in {self.arguments.copies} copies"

    def _skills(self, graph: AdapterGraph, write: WriteNode) -> int:
        """The mixture of one insertion, the same for all of its tensors."""
        spec = TensorSpec("mix.logits", (self.arguments.copies,), "uniform(0.001)")
        key = f"{write.path}.{write.key}.{spec.name}"
        logits = graph.add(TensorNode(spec, write.member, write.module, key))
        return graph.add(OperationNode(SkillWeights(Arguments(), _NOWHERE)), (logits,))

    def _copy(
        self,
        graph: AdapterGraph,
        address: int,
        members: tuple[str, ...],
        shared: set[str],
        skills: int | None,
    ) -> int:
        route, kind = skills, SelectCopy if skills is None else MixCopies
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
            select = OperationNode(kind(Arguments(), _NOWHERE))
            inputs[index] = graph.add(select, (source, route))
            copied += 1
        graph.set_inputs(address, tuple(inputs))
        return copied

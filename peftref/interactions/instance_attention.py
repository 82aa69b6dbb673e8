"""Prompts that become one prompt for each sample."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

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
from peftref.ir.types import OperationNode, ReadNode, TensorNode
from peftref.registry import couplings
from peftref.spec.typology import IntegrationKind

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AttendPrompts", "InstanceAttention", "InstanceAttentionArguments"]

MEMBER = "instance_attention"
"""The member that the trained weights belong to, as phases name it."""


class InstanceAttentionArguments(CouplingArguments):
    """How prompts are weighed; the last member is the target, the others are its sources.

    ``width``: of the generator's bottleneck; ``temperature``: the scores are divided by it.
    """

    width: int = Field(default=100, gt=0)
    temperature: float = Field(default=2000.0, gt=0.0)


class AttendPrompts(Primitive[Arguments]):
    """``P_0 + sum_j a_j P_j``, ``a = softmax_j(max(P_j) . u / T)`` over sources and target.

    ``u = norm(W_up silu(W_down max(E(x))))``; both maxima are over rows, that of the text leaves
    out padding and prompt.
    """

    name = "attend_prompts"

    def __init__(self, place: Place, members: int, how: InstanceAttentionArguments) -> None:
        super().__init__(Arguments(), place)
        self.members = members
        self.how = how

    @property
    def width(self) -> int:
        return self.place.d_out

    def tensors(self) -> tuple[TensorSpec, ...]:
        d, width = self.place.d_out, self.how.width
        return (
            TensorSpec(f"{MEMBER}.down.weight", (width, d), "kaiming_uniform"),
            TensorSpec(f"{MEMBER}.up.weight", (d, width), "kaiming_uniform"),
            TensorSpec(f"{MEMBER}.norm.weight", (d,), "ones"),
            TensorSpec(f"{MEMBER}.norm.bias", (d,), "zeros"),
        )

    def algebra(self) -> Algebra:
        return Algebra(source=True, per_sample=True, mixes_tokens=True)

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        return replace(self.algebra(), random=any(f.random for f in inputs))

    def flops(self) -> int:
        return 4 * self.place.d_out * self.how.width  # once a sample, here counted for a token

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn.functional import layer_norm, linear, silu

        n, temperature = self.members, self.how.temperature
        words = f"{self.place.stack}:words"

        def attend(x: Tensor, *rest: Tensor) -> Tensor:
            if x.dim() < 3:
                return rest[n - 1]  # outside of a call only the number of rows is asked for
            prompts = torch.stack(rest[:n])
            down, up, scale, shift = rest[n:]
            real = runtime.token_mask(words)
            text = x if real is None else x.masked_fill(~real[..., None], -torch.inf)
            made = linear(silu(linear(text.amax(1), down)), up)
            u = layer_norm(made, made.shape[-1:], scale, shift)
            shares = (u @ prompts.amax(1).t() / temperature).softmax(-1)
            return rest[n - 1] + torch.einsum("bt,tld->bld", shares, prompts)

        return attend


@couplings.register("instance_attention")
class InstanceAttention(Coupling[InstanceAttentionArguments]):
    """The prompts of the members become one, made anew for every sample.

    The members put rows before the tokens, all equally many. Sources usually start from saved
    prompts (``start_from``) and are frozen (``freeze``). ATTEMPT, Asai et al. 2022,
    https://arxiv.org/abs/2205.11961
    """

    name = MEMBER
    Arguments = InstanceAttentionArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        writes = {write.member: (address, write) for address, write in graph.writes(members)}
        if len(graph.writes(members)) != len(members) or len(members) < 2:
            raise CompositionError(
                "instance_attention: takes at least two members with one prompt each, the target "
                "last"
            )
        for _, write in writes.values():
            if write.kind is not IntegrationKind.CONCAT or "embedding" not in write.site.role:
                raise CompositionError(
                    f"instance_attention: {write.label} puts no rows before the tokens"
                )
        kept, target = writes[members[-1]]
        counts = {m: _rows(graph, writes[m][0]) for m in members}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{m} {count}" for m, count in counts.items())
            raise CompositionError(f"instance_attention: prompts of unequal lengths: {found}")
        place = Place(0, target.site.d_out, graph.table.hidden_size, stack=target.site.stack)
        primitive = AttendPrompts(place, len(members), self.arguments)
        read = graph.add(ReadNode(target.site, target.read))
        values = tuple(graph.value(writes[m][0]) for m in members)
        tensors = tuple(
            graph.add(TensorNode(spec, MEMBER, target.module, f"{target.path}.{spec.name}"))
            for spec in primitive.tensors()
        )
        graph.set_inputs(kept, (graph.add(OperationNode(primitive), (read, *values, *tensors)),))
        for member in members[:-1]:
            graph.remove(writes[member][0])
        return f"{len(members)} prompts"


def _rows(graph: AdapterGraph, address: int) -> int:
    """Number of rows of a prompt: those of the first tensor that it begins with."""
    return graph.tensors_of(address)[0][1].spec.shape[0]


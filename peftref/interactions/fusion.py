"""Several members at one place become one edit that weighs what they give."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

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
from peftref.ir.types import OperationNode, ReadNode, TensorNode, WriteNode
from peftref.registry import couplings
from peftref.spec.typology import IntegrationKind, Port

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AttendMembers", "Fusion", "FusionArguments", "ScaleMembers"]

_ADDS = (IntegrationKind.ADD, IntegrationKind.SCALED_ADD)


class FusionArguments(CouplingArguments):
    """How the members' results become one.

    ``kind``: ``attention`` over the members, token by token (AdapterFusion), or ``scale``, a
    trained weight for each (ScaLearn). ``per``: one weight an element of the stream, or one a
    member; ``shared``: the same weights in all layers (the ++ forms).
    """

    kind: Literal["attention", "scale"] = "attention"
    per: Literal["element", "member"] = "element"
    shared: bool = False


class _OfMembers(Primitive[Arguments]):
    """Reads the stream that the members read, then the result of each."""

    def __init__(self, place: Place, scales: tuple[float, ...], share: str | None) -> None:
        super().__init__(Arguments(), place)
        self.scales = scales
        self.share = share

    @property
    def width(self) -> int:
        return self.place.d_out

    def _tensor(self, name: str, shape: tuple[int, ...], init: str) -> TensorSpec:
        return TensorSpec(f"fusion.{name}", shape, init, share=self.share)

    def _scaled(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = zip(values, self.scales, strict=True)
        return tuple(v if s == 1.0 else v * s for v, s in pairs)


class AttendMembers(_OfMembers):
    """``sum_t a_t (z_t W_V)``, ``a = softmax_t((u W_Q + b_Q) . (z_t W_K + b_K))``.

    ``u`` is what the members read, ``z_t`` what member ``t`` would add. AdapterFusion, Pfeiffer
    et al. 2021, https://arxiv.org/abs/2005.00247
    """

    name = "attend_members"

    def tensors(self) -> tuple[TensorSpec, ...]:
        d, read = self.place.d_out, self.place.d_in
        return (
            self._tensor("query.weight", (d, read), "normal(0.02)"),
            self._tensor("query.bias", (d,), "zeros"),
            self._tensor("key.weight", (d, d), "normal(0.02)"),
            self._tensor("key.bias", (d,), "zeros"),
            self._tensor("value.weight", (d, d), "near_eye(0.000001)"),
        )

    def algebra(self) -> Algebra:
        return Algebra()

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        return Algebra(
            zero_at_init=all(f.zero_at_init for f in inputs[1:]),
            keeps_zero=all(f.keeps_zero for f in inputs[1:]),
            random=any(f.random for f in inputs[1:]),
            mixes_tokens=any(f.mixes_tokens for f in inputs[1:]),
            per_sample=any(f.per_sample for f in inputs[1:]),
        )

    def flops(self) -> int:
        d, n = self.place.d_out, len(self.scales)
        return 2 * d * self.place.d_in + n * (4 * d * d + 4 * d)

    def bind(self, runtime: Runtime) -> Operation:
        import torch
        from torch.nn.functional import linear

        n = len(self.scales)

        def attend(u: Tensor, *rest: Tensor) -> Tensor:
            z = torch.stack(self._scaled(rest[:n]))
            w_q, b_q, w_k, b_k, w_v = rest[n:]
            scores = (linear(u, w_q, b_q) * linear(z, w_k, b_k)).sum(-1, keepdim=True)
            return (scores.softmax(0) * linear(z, w_v)).sum(0)

        return attend


class ScaleMembers(_OfMembers):
    """``sum_t w_t * z_t``: linear where the members are.

    ScaLearn, Frohmann et al. 2024, https://arxiv.org/abs/2310.01217
    """

    name = "scale_members"

    def __init__(
        self, place: Place, scales: tuple[float, ...], share: str | None, *, per_element: bool
    ) -> None:
        super().__init__(place, scales, share)
        self.per_element = per_element

    def tensors(self) -> tuple[TensorSpec, ...]:
        n = len(self.scales)
        shape = (n, self.place.d_out if self.per_element else 1)
        return (self._tensor("weight", shape, f"near({1 / n!r})"),)

    def algebra(self) -> Algebra:
        return Algebra()

    def combine(self, inputs: tuple[Algebra, ...]) -> Algebra:
        members = inputs[1:]
        return Algebra(
            linear=all(f.linear for f in members),
            matrix=all(f.matrix for f in members),
            stream=all(f.stream for f in members),
            diagonal=all(f.diagonal for f in members),
            source=all(f.source for f in members),
            zero_at_init=all(f.zero_at_init for f in members),
            keeps_zero=all(f.keeps_zero for f in members),
            random=any(f.random for f in members),
            mixes_tokens=any(f.mixes_tokens for f in members),
            per_sample=any(f.per_sample for f in members),
        )

    def flops(self) -> int:
        return 2 * self.place.d_out * len(self.scales)

    def matrix_flops(self) -> int:
        return 2 * self.place.d_in * self.place.d_out * len(self.scales)

    def bind(self, runtime: Runtime) -> Operation:
        def total(_: Tensor, *rest: Tensor) -> Tensor:
            weight = rest[-1]
            values = self._scaled(rest[:-1])
            result = values[0] * weight[0]
            for value, row in zip(values[1:], weight[1:], strict=True):
                result = result + value * row
            return result

        return total

    def bind_matrix(self, runtime: Runtime) -> Operation:
        def total(_: Tensor | None, *rest: Tensor) -> Tensor:
            weight = rest[-1]
            values = self._scaled(rest[:-1])
            matrices = values[0].dim() > 1  # differences of norms and biases are vectors
            result = values[0] * (weight[0][:, None] if matrices else weight[0])
            for value, row in zip(values[1:], weight[1:], strict=True):
                result = result + value * (row[:, None] if matrices else row)
            return result

        return total


@couplings.register("fusion")
class Fusion(Coupling[FusionArguments]):
    """The members' additions at each place are weighed by trained parameters.

    The members must write the same places, by addition. They go on to train with the fusion
    unless phases say otherwise (AdapterFusion and ScaLearn train them first, then freeze them).
    """

    name = "fusion"
    Arguments = FusionArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        if len(members) < 2:
            raise CompositionError("fusion: weighs at least two members; found one")
        places: dict[tuple[str, str, str, str], list[tuple[int, WriteNode]]] = {}
        for address, write in graph.writes(members):
            if write.kind not in _ADDS or write.gated:
                raise CompositionError(
                    f"fusion: {write.label} joins by {write.kind.value}"
                    f"{' under a gate' if write.gated else ''}; members must add"
                )
            place = write.site.label, write.port.value, write.read.value, write.insertion.value
            places.setdefault(place, []).append((address, write))
        for (label, *_), writes in places.items():
            found = [write.member for _, write in writes]
            if sorted(found) != sorted(members):
                raise CompositionError(
                    f"fusion: at {label} there are edits of {', '.join(found)}; each of "
                    f"{', '.join(members)} must write every place once, from the same port"
                )
            self._join(graph, writes)
        return f"{len(places)} fusions of {len(members)} members"

    def _join(self, graph: AdapterGraph, writes: list[tuple[int, WriteNode]]) -> None:
        kept, first = writes[0]
        values = tuple(graph.value(address) for address, _ in writes)
        reads = graph.reads_of(kept)
        # A trained difference reads nothing; its place still has an input.
        read = reads[0] if reads else graph.add(ReadNode(first.site, Port.INPUT))
        primitive = self._primitive(graph, first, tuple(w.scale or 1.0 for _, w in writes))
        tensors = tuple(
            graph.add(TensorNode(
                spec, FUSION, first.module, f"{first.path}.{first.key}.{spec.name}"))
            for spec in primitive.tensors()
        )
        fused = graph.add(OperationNode(primitive), (read, *values, *tensors))
        graph.set_inputs(kept, (fused,))
        graph.set(kept, replace(first, kind=IntegrationKind.ADD, scale=None))
        for address, _ in writes[1:]:
            graph.remove(address)

    def _primitive(
        self, graph: AdapterGraph, write: WriteNode, scales: tuple[float, ...]
    ) -> _OfMembers:
        site, a = write.site, self.arguments
        d_in = ReadNode(site, write.read).width
        d_out = site.d_in if write.port.value == "input" else site.d_out
        place = Place(d_in, d_out, graph.table.hidden_size, stack=site.reads_stack)
        share = f"@{site.role}" if a.shared else None
        if a.kind == "attention":
            return AttendMembers(place, scales, share)
        return ScaleMembers(place, scales, share, per_element=a.per == "element")


FUSION = "fusion"
"""The member that the trained weights of a fusion belong to, as phases name it."""

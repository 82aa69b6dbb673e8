"""Binary masks on the tensors of any technique."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import Algebra, Arguments, Operation, Place, Primitive, Runtime
from peftref.ir.types import OperationNode, TensorNode
from peftref.registry import couplings
from peftref.spec.technique import ProcedureSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ApplyMask", "Prune", "PruneArguments"]

_NOWHERE = Place(0, 0, 0)


class PruneArguments(CouplingArguments):
    """``keep``: share of the entries that stay (the density, not the sparsity)."""

    criterion: Literal["magnitude", "snip", "random", "er"] = "snip"
    keep: float = Field(default=0.6, gt=0.0, le=1.0)
    scope: Literal["global", "local"] = "global"
    batches: int = Field(default=4, gt=0)


class ApplyMask(Primitive[Arguments]):
    """``w * m``: the mask is part of the forward, so masked entries have no gradient either."""

    name = "apply_mask"
    on_tensors = True

    def algebra(self) -> Algebra:
        return Algebra()

    def bind(self, runtime: Runtime) -> Operation:
        def apply(weight: Tensor, mask: Tensor) -> Tensor:
            return weight * mask.to(weight.dtype)

        return apply


@couplings.register("prune")
class Prune(Coupling[PruneArguments]):
    """SparseAdapter over any technique: matrices are masked, vectors (biases) never.

    The masks are computed once, before training, by the procedure ``prune``.
    He et al. 2022, https://arxiv.org/abs/2210.04284
    """

    name = "prune"
    Arguments = PruneArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        masked: set[int] = set()
        for write_address, _ in graph.writes(members):
            for address, node in graph.tensors_of(write_address):
                if address not in masked and self._prunable(node):
                    self._mask(graph, address, node)
                    masked.add(address)
        if not masked:
            raise CompositionError(f"prune: {', '.join(members)} has no matrix to prune")
        arguments = {"members": ",".join(members), **self.arguments.model_dump()}
        graph.procedures.append(ProcedureSpec(name="prune", arguments=arguments))
        return f"{len(masked)} tensors masked to {self.arguments.keep:.0%}"

    @staticmethod
    def _prunable(node: TensorNode) -> bool:
        spec = node.spec
        dimensions = len(spec.shape) - (1 if spec.stacked else 0)
        return spec.trainable and not spec.buffer and dimensions >= 2

    @staticmethod
    def _mask(graph: AdapterGraph, address: int, node: TensorNode) -> None:
        users = graph.users(address)
        spec = replace(
            node.spec, name=f"{node.spec.name}_mask", init="ones", trainable=False, buffer=True,
            stacked=0,
        )
        mask = graph.add(replace(node, spec=spec, key=f"{node.key}_mask"))
        product = graph.add(OperationNode(ApplyMask(Arguments(), _NOWHERE)), (address, mask))
        for user in users:
            inputs = tuple(product if i == address else i for i in graph.inputs(user))
            graph.set_inputs(user, inputs)

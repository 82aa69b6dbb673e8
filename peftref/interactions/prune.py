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

class PruneArguments(CouplingArguments):
    """What is kept, by which score, when.

    Attributes:
        criterion: the score, see `peftref.pruning.scores`.
        keep: share of the groups that stay (the density, not the sparsity).
        count: exactly so many instead; for each tensor with scope local.
        scope: all tensors ranked together, or each for itself.
        granularity: what is kept or cut together: an entry, a piece of a row, a row, a tensor.
        pieces: equal parts of a row, for granularity piece.
        vectors: whether vectors (biases, scales) are masked as well.
        when: ``setup``, before training, or the name of a phase, when it begins.
        per: what the criteria ``fisher`` and ``importance`` average over.
        batches: that gradients are taken of.
    """

    criterion: Literal[
        "magnitude", "snip", "random", "er", "grasp", "fisher", "gradient", "first_order",
        "importance",
    ] = "snip"
    keep: float = Field(default=0.6, gt=0.0, le=1.0)
    count: int | None = Field(default=None, gt=0)
    scope: Literal["global", "local"] = "global"
    granularity: Literal["entry", "piece", "row", "tensor"] = "entry"
    pieces: int = Field(default=1, gt=0)
    vectors: bool = False
    when: str = "setup"
    per: Literal["example", "batch"] = "example"
    batches: int = Field(default=4, gt=0)


class ApplyMask(Primitive[Arguments]):
    """``w * m``: the mask is part of the forward, so masked entries have no gradient either.

    A masked entry is ``neutral``, the value at which it changes nothing: one where the tensor is
    a scale that starts at one, else zero.
    """

    name = "apply_mask"
    on_tensors = True

    def __init__(self, neutral: float = 0.0) -> None:
        super().__init__(Arguments(), Place(0, 0, 0))
        self.neutral = neutral

    def algebra(self) -> Algebra:
        return Algebra()

    def bind(self, runtime: Runtime) -> Operation:
        neutral = self.neutral

        def apply(weight: Tensor, mask: Tensor) -> Tensor:
            if neutral == 0.0:
                return weight * mask.to(weight.dtype)
            return neutral + (weight - neutral) * mask.to(weight.dtype)

        return apply


@couplings.register("prune")
class Prune(Coupling[PruneArguments]):
    """SparseAdapter over any technique: matrices are masked, vectors (biases) when asked.

    The masks are chosen once by the procedure ``prune``. Several prunes of one member are
    applied together; a later one chooses among what the earlier ones left.
    He et al. 2022, https://arxiv.org/abs/2210.04284
    """

    name = "prune"
    Arguments = PruneArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        nodes: dict[int, TensorNode] = {}
        taken: set[str] = set()
        for write_address, _ in graph.writes(members):
            for address, node in graph.tensors_of(write_address):
                taken.add(node.spec.name)
                if self._prunable(node):
                    nodes[address] = node
        if not nodes:
            what = "tensor" if self.arguments.vectors else "matrix"
            hint = "" if self.arguments.vectors else "; vectors: true masks biases and scales"
            raise CompositionError(f"prune: {', '.join(members)} has no {what} to prune{hint}")
        ending, number = "_mask", 1
        while any(f"{node.spec.name}{ending}" in taken for node in nodes.values()):
            number += 1
            ending = f"_mask_{number}"
        for address, node in nodes.items():
            self._mask(graph, address, node, ending)
        arguments = self.arguments.model_dump(exclude={"vectors"}, exclude_none=True)
        arguments |= {"members": ",".join(members), "mask": ending}
        graph.procedures.append(ProcedureSpec(name="prune", arguments=arguments))
        kept = self.arguments.count or f"{self.arguments.keep:.0%}"
        return f"{len(nodes)} tensors masked to {kept}"

    def _prunable(self, node: TensorNode) -> bool:
        spec = node.spec
        if spec.init == "eye":
            raise CompositionError(
                f"prune: {spec.name!r} of {node.member} starts at identity matrices, which a mask "
                "would cut; prune other members"
            )
        dimensions = len(spec.shape) - (1 if spec.stacked else 0)
        whole = spec.trainable and not spec.buffer and not spec.selects
        return whole and (self.arguments.vectors or dimensions >= 2)

    @staticmethod
    def _mask(graph: AdapterGraph, address: int, node: TensorNode, ending: str) -> None:
        users = graph.users(address)
        spec = replace(
            node.spec, name=f"{node.spec.name}{ending}", init="ones", trainable=False,
            buffer=True, stacked=0,
        )
        mask = graph.add(replace(node, spec=spec, key=f"{node.key}{ending}"))
        neutral = 1.0 if node.spec.init == "ones" else 0.0
        product = graph.add(OperationNode(ApplyMask(neutral)), (address, mask))
        for user in users:
            inputs = tuple(product if i == address else i for i in graph.inputs(user))
            graph.set_inputs(user, inputs)

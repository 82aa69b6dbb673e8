"""Trained masks on the tensors of any technique."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftref.errors import CompositionError
from peftref.interactions.base import Coupling, CouplingArguments
from peftref.ir.graph import AdapterGraph
from peftref.ir.primitive import Algebra, Arguments, Operation, Place, Primitive, Runtime
from peftref.ir.types import OperationNode, TensorNode
from peftref.pruning.straight_through import hard_concrete, threshold, top_k
from peftref.registry import couplings
from peftref.spec.technique import ProcedureSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mask", "MaskArguments", "MaskBy"]

SCORES = "_scores"


class MaskArguments(CouplingArguments):
    """How scores become a mask.

    Attributes:
        kind: ``top_k`` of each tensor, ``threshold``, or ``hard_concrete`` gates.
        keep: share of each tensor that is open, for ``top_k``.
        threshold: least score that is open, for ``threshold``.
        init: initialiser of the scores.
        rate: learning rate of the scores, over that of the member.
        vectors: whether vectors (biases, scales) are masked as well.
        penalty: weight of the expected number of open ``hard_concrete`` gates in the loss.
        fold: phase at whose begin the ``hard_concrete`` gates enter the values, and stay open.
    """

    kind: Literal["top_k", "threshold", "hard_concrete"] = "top_k"
    keep: float = Field(default=0.5, gt=0.0, le=1.0)
    threshold: float = 0.0
    init: str = "kaiming_uniform"
    rate: float = Field(default=1.0, gt=0.0)
    vectors: bool = False
    penalty: float = Field(default=0.0, ge=0.0)
    fold: str | None = None


class MaskBy(Primitive[Arguments]):
    """``w * m(s)`` with trained scores ``s``; the gradient of ``m`` is handed to ``s``."""

    name = "mask_by"
    on_tensors = True

    def __init__(self, how: MaskArguments) -> None:
        super().__init__(Arguments(), Place(0, 0, 0))
        self.how = how

    def algebra(self) -> Algebra:
        return Algebra(random=self.how.kind == "hard_concrete")

    def bind(self, runtime: Runtime) -> Operation:
        how = self.how

        def mask(weight: Tensor, scores: Tensor) -> Tensor:
            if how.kind == "top_k":
                return weight * top_k(scores, how.keep)
            if how.kind == "threshold":
                return weight * threshold(scores, how.threshold)
            return weight * hard_concrete(scores, draw=runtime.training)

        return mask


@couplings.register("mask")
class Mask(Coupling[MaskArguments]):
    """Every site has scores of its own, also where the tensor is shared: put ``share`` first.

    ProPETL masks one shared prototype for each layer (Zeng et al. 2023,
    https://arxiv.org/abs/2305.17682); Diff pruning masks a difference with hard-concrete gates
    (Guo et al. 2021, https://arxiv.org/abs/2012.07463).
    """

    name = "mask"
    Arguments = MaskArguments

    def apply(self, graph: AdapterGraph, members: tuple[str, ...]) -> str:
        a = self.arguments
        if a.kind != "hard_concrete" and (a.penalty or a.fold):
            raise CompositionError("mask: penalty and fold go with kind hard_concrete")
        masked: set[int] = set()
        scores: dict[str, int] = {}  # a tensor used twice at a site has one mask there
        for write_address, _ in graph.writes(members):
            for address, node in graph.tensors_of(write_address):
                if address not in masked and self._maskable(node, members):
                    self._mask(graph, address, node, scores)
                    masked.add(address)
        if not masked:
            raise CompositionError(f"mask: {', '.join(members)} has no tensor to mask")
        if a.kind == "hard_concrete":
            given = {"members": ",".join(members), "penalty": a.penalty, "fold": a.fold}
            graph.procedures.append(ProcedureSpec(name="gates", arguments=given))
        return f"{len(masked)} tensors masked by scores"

    def _maskable(self, node: TensorNode, members: tuple[str, ...]) -> bool:
        spec = node.spec
        if spec.selects:
            raise CompositionError(f"mask: {', '.join(members)} is masked by scores already")
        if spec.stacked:
            raise CompositionError("mask: copies of a mix cannot be masked one by one")
        enough = self.arguments.vectors or len(spec.shape) > 1
        return spec.trainable and not spec.buffer and enough

    def _mask(
        self, graph: AdapterGraph, address: int, node: TensorNode, known: dict[str, int]
    ) -> None:
        users = graph.users(address)
        spec = replace(
            node.spec, name=f"{node.spec.name}{SCORES}", init=self.arguments.init, share=None,
            sliced=False, selects=True, rate=self.arguments.rate,
        )
        key = f"{node.key}{SCORES}"
        scores = known.get(key)
        if scores is None:
            scores = known[key] = graph.add(replace(node, spec=spec, key=key))
        product = graph.add(OperationNode(MaskBy(self.arguments)), (address, scores))
        for user in users:
            inputs = tuple(product if i == address else i for i in graph.inputs(user))
            graph.set_inputs(user, inputs)

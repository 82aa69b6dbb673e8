"""How each edit of a weight is evaluated: as a map of the stream, or as a formed weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftref.errors import CompositionError
from peftref.ir.graph import AdapterGraph
from peftref.ir.types import Form, Stage, WriteNode

__all__ = ["ChooseLowering"]

_BACKWARD = 3  # forward and backward of a map cost about three forwards


@dataclass(frozen=True, slots=True)
class ChooseLowering:
    """One form for all weight edits of a module, the cheaper one for ``tokens`` tokens a step.

    Case 1: some function rotates the input of a slice only: formed.
    Case 2: some function draws random numbers (dropout): factored; formed is refused.
    Case 3: else by multiply-adds. Forming costs the matrix and, in the backward pass, a whole
    weight gradient (2 x tokens x d_in x d_out), which thin factors avoid.
    A 16-bit weight is never formed for additions, whatever this says: small updates would be
    rounded away (the fold decides that, as a plan knows no types).
    """

    tokens: int = 1024
    name: str = "choose lowering"

    def run(self, graph: AdapterGraph) -> str:
        modules: dict[str, list[tuple[int, WriteNode]]] = {}
        for address, write in graph.writes():
            if write.stage is not None and write.stage.on_weight:
                modules.setdefault(write.path, []).append((address, write))
        formed = 0
        for writes in modules.values():
            form = self._form(graph, writes)
            formed += form is Form.FORMED
            for address, write in writes:
                graph.set(address, replace(write, form=form))
        return f"{len(modules) - formed} modules factored, {formed} formed"

    def _form(self, graph: AdapterGraph, writes: list[tuple[int, WriteNode]]) -> Form:
        must_form = [w for _, w in writes if w.must_form]
        draws = [w for _, w in writes if w.algebra is not None and w.algebra.random]
        if must_form and draws:
            raise CompositionError(
                f"{draws[0].label}: dropout acts on the stream, but {must_form[0].label} needs "
                "the weight to be formed here; set dropout to 0"
            )
        if must_form:
            return Form.FORMED
        if draws:
            return Form.FACTORED
        return Form.FACTORED if self._factored_is_cheaper(graph, writes) else Form.FORMED

    def _factored_is_cheaper(
        self, graph: AdapterGraph, writes: list[tuple[int, WriteNode]]
    ) -> bool:
        site = writes[0][1].site
        factored = formed = 0
        for address, write in writes:
            operations = [node.primitive for _, node in graph.operations_of(address)]
            if write.needs_matrix:
                factored += self.tokens * 2 * write.site.d_in * write.site.d_out
            elif write.stage is not Stage.WEIGHT_NORM:
                factored += self.tokens * sum(op.flops() for op in operations)
            formed += sum(op.matrix_flops() for op in operations)
            formed += site.d_in * max(op.flops() for op in operations)
        gradient = 2 * self.tokens * site.d_in * site.d_out
        return _BACKWARD * factored <= _BACKWARD * formed + gradient

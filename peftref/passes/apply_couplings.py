"""Couplings rewrite the members that they name, in the order written."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from peftref.ir.graph import AdapterGraph
from peftref.ir.types import TensorNode
from peftref.passes.base import Library, make_procedure, wrong_argument
from peftref.spec.technique import ProcedureSpec

__all__ = ["ApplyCouplings"]


@dataclass(frozen=True, slots=True)
class ApplyCouplings:
    """Each coupling is looked up by name and given its members; none means all."""

    library: Library
    name: str = "apply couplings"

    def run(self, graph: AdapterGraph) -> str:
        everyone = tuple(member.name for member in graph.composition.members)
        done: list[str] = []
        for spec in graph.composition.couplings:
            kind = self.library.coupling(spec.name)
            try:
                arguments = kind.Arguments(**spec.arguments)
            except ValidationError as error:
                raise wrong_argument(spec.name, error, kind.Arguments, spec.mark) from None
            done.append(f"{spec.name}: {kind(arguments).apply(graph, spec.members or everyone)}")
        own = [self._of_member(procedure, member.name)
               for member in graph.composition.members
               for procedure in member.technique.procedures]
        for procedure in (*own, *graph.composition.procedures):
            # Two members of one technique ask for the same: it covers both.
            if procedure not in graph.procedures:
                graph.procedures.append(procedure)
        # What a coupling trains itself goes by the coupling's name.
        known = tuple(dict.fromkeys([
            *everyone, *(node.member for _, node in graph.of_type(TensorNode))]))
        tensors = tuple((node.member, node.spec) for _, node in graph.of_type(TensorNode))
        made = [make_procedure(spec, self.library) for spec in graph.procedures]
        for procedure in made:
            procedure.check(known, made)
            procedure.check_tensors(tensors)
        return "; ".join(done) or "none"

    def _of_member(self, procedure: ProcedureSpec, member: str) -> ProcedureSpec:
        """What a technique asks for is about its own tensors, in whatever company it is."""
        fields = self.library.procedure(procedure.name).Arguments.model_fields
        if "members" not in fields or "members" in procedure.arguments:
            return procedure
        return procedure.model_copy(
            update={"arguments": {**procedure.arguments, "members": member}})

"""Couplings rewrite the members that they name, in the order written."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from peftref.ir.graph import AdapterGraph
from peftref.passes.base import Library, make_procedure, wrong_argument

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
        for member in graph.composition.members:
            graph.procedures.extend(member.technique.procedures)
        graph.procedures.extend(graph.composition.procedures)
        made = [make_procedure(spec, self.library) for spec in graph.procedures]
        for procedure in made:
            procedure.check(everyone, made)
        return "; ".join(done) or "none"

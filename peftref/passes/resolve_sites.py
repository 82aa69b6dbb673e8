"""From selectors to places: one read, one function and one write for every site."""

from __future__ import annotations

from dataclasses import dataclass

from peftref.backbone.selection import select
from peftref.backbone.site_table import Site, SiteKind
from peftref.errors import CompositionError
from peftref.ir.graph import AdapterGraph
from peftref.ir.types import FunctionNode, ReadNode, WriteNode
from peftref.spec.technique import ModuleSpec
from peftref.spec.typology import InsertionForm, IntegrationKind, Port

__all__ = ["ResolveSites"]


@dataclass(frozen=True, slots=True)
class ResolveSites:
    """Case 1: a module matches sites: one edit for each.

    Case 2: it matches none and is optional: nothing.
    Case 3: a member has no edit at all: refused.
    """

    name: str = "resolve sites"

    def run(self, graph: AdapterGraph) -> str:
        count = 0
        for rank, member in enumerate(graph.composition.members):
            inserted = targets = 0
            for index, module in enumerate(member.technique.modules):
                for site in _sites(graph, module):
                    if self._is_target_prompt(graph, module, site):
                        targets += 1
                        continue
                    self._insert(graph, member.name, module, site, (rank, index))
                    inserted += 1
            if targets and not inserted:
                raise CompositionError(
                    f"member {member.name!r} ({member.technique.technique}) puts its rows before "
                    f"the encoder's tokens, and the encoder of this {graph.table.family} backbone "
                    "reads none; use prefixes"
                )
            if not inserted:
                raise CompositionError(
                    f"member {member.name!r} ({member.technique.technique}) is inserted nowhere "
                    f"in this {graph.table.family} backbone; its sites are all optional and "
                    "absent here"
                )
            count += inserted
        return f"{count} insertions"

    @staticmethod
    def _is_target_prompt(graph: AdapterGraph, module: ModuleSpec, site: Site) -> bool:
        """A prompt goes in front of the input, which an encoder-decoder reads in the encoder."""
        joins = module.interaction.integration.kind is IntegrationKind.CONCAT
        target = site.stack == "decoder" and len(graph.table.layers) > 1
        return joins and site.kind is SiteKind.EMBEDDING and target

    def _insert(
        self,
        graph: AdapterGraph,
        member: str,
        module: ModuleSpec,
        site: Site,
        order: tuple[int, int],
    ) -> None:
        port, read = self._ports(module, site)
        if site.kind is SiteKind.STACK and read not in site.ports:
            raise CompositionError(
                f"{member}.{module.name} @ {site.label}: all layers together have the ports "
                f"hidden_states and output; the module reads {read.value!r}"
            )
        write = WriteNode(
            member=member,
            module=module.name,
            site=site,
            port=port,
            read=read,
            insertion=module.interaction.insertion,
            kind=module.interaction.integration.kind,
            scale=module.interaction.integration.scale,
            order=order,
            after=module.after,
            key=_key(member, module.name, site),
            positions=module.site.positions,
        )
        source = graph.add(ReadNode(site, read))
        function = graph.add(FunctionNode(module.function), (source,))
        graph.add(write, (function,))

    @staticmethod
    def _ports(module: ModuleSpec, site: Site) -> tuple[Port, Port]:
        port = module.site.port
        sequential = module.interaction.insertion is InsertionForm.SEQUENTIAL
        read = module.read
        if read is None:
            on_stream = port in (Port.INPUT, Port.OUTPUT)
            read = port if sequential and on_stream else Port.INPUT
        if site.kind is SiteKind.SPAN and site.role.startswith("residual."):
            # In a pre-norm model nothing lies between the sum and what follows it: the two
            # ports are one tensor.
            return Port.OUTPUT, Port.OUTPUT
        return port, read


def _sites(graph: AdapterGraph, module: ModuleSpec) -> tuple[Site, ...]:
    """The sites that a module selects; an optional one may find its port missing everywhere."""
    selector = module.site
    if not module.optional:
        return select(graph.table, selector)
    anywhere = selector.model_copy(update={"port": Port.OUTPUT})
    return tuple(s for s in select(graph.table, anywhere) if selector.port in s.ports)


def _key(member: str, module: str, site: Site) -> str:
    """Name of the edit; carries the role where one module can hold several sites."""
    shared = site.rows is not None or site.kind in (SiteKind.SPAN, SiteKind.ATTENTION)
    shared = shared or site.expert is not None or site.input is not None
    role = site.role.replace(".", "_") + ("" if site.expert is None else f"_{site.expert}")
    return f"{member}.{module}.{role}" if shared else f"{member}.{module}"

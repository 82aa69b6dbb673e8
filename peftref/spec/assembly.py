"""From names, expressions and files to one `CompositionSpec`.

An `Assembly` holds one view of the catalogue. It builds members depth first and collects, beside
the spec, the parameters that a user can still set, under the names by which they are set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from peftref.errors import Mark, SpecError, unknown_name
from peftref.spec.catalogue import Entry, entries, read_template
from peftref.spec.composition import (
    CompositionFile,
    CompositionSpec,
    CouplingSpec,
    Member,
    MemberUse,
)
from peftref.spec.expression import Coupled, Term, Use, format_expression, parse_expression
from peftref.spec.loader import Node, node_of
from peftref.spec.parameter import Parameter, ParameterValue
from peftref.spec.technique import LearningRate, ProcedureSpec
from peftref.spec.template import Template

__all__ = ["Assembly", "Built"]

Given = dict[str, Node]
DEEPEST_USE = 24
_NAMES_MEMBERS = frozenset(
    ("members", "member", "train", "rewind", "encoder", "decoder", "teacher", "student")
)


@dataclass(frozen=True, slots=True)
class Built:
    """A spec and the parameters that can be set on it.

    Attributes:
        spec: the composition.
        parameters: by settable name; a default is the value in ``spec``.
        groups: names that couplings may use for several members at once.
    """

    spec: CompositionSpec
    parameters: Mapping[str, Parameter]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Assembly:
    """Builds compositions over one view of the catalogue.

    Args:
        folder: where relative paths start; None: the current folder.
        known: the catalogue; None: read it now.
    """

    def __init__(self, folder: Path | None = None, known: Mapping[str, Entry] | None = None,
                 depth: int = 0) -> None:
        self.folder = folder or Path()
        self.known = entries() if known is None else known
        self.depth = depth

    def below(self, folder: Path) -> Assembly:
        """Return an assembly for what a file in ``folder`` uses."""
        return Assembly(folder, self.known, self.depth + 1)

    def expand(self, name: str, arguments: Node) -> Node | None:
        """Return what the macro ``name`` stands for; None where it is none."""
        entry = self.known.get(name)
        if entry is None or entry.kind != "macro":
            return None
        return entry.template.function(arguments)

    def expression(self, text: str, given: Given, at: Mark | None = None) -> Built:
        """Return what an expression means; ``given`` is by ``label.parameter``.

        Raises:
            SpecError: unknown names, values that fit nothing, or circular use.
        """
        if self.depth > DEEPEST_USE:
            raise SpecError(f"{text!r}: compositions use each other in a circle", mark=at)
        terms = parse_expression(text, at)
        if len(terms) == 1 and isinstance(terms[0], Use):
            return self.use(terms[0], given, self.label(terms[0]))
        joint = _Joint(self, dict(given))
        for term in terms:
            joint.add(term)
        return joint.finish(format_expression(terms))

    def label(self, use: Use) -> str:
        """Return the name of what ``use`` uses."""
        return self.template(use)[0].name

    def template(self, use: Use) -> tuple[Template, Path]:
        """Return the template of a name or path, and the folder of its file."""
        if use.is_path:
            path = (self.folder / use.name).expanduser()
            return read_template(path), path.parent
        entry = self.known.get(use.name)
        if entry is None or entry.kind == "macro":
            named = [name for name, e in self.known.items() if e.kind != "macro"]
            raise SpecError(unknown_name("technique or composition", use.name, named),
                            mark=use.mark)
        return entry.template, entry.path.parent

    def use(self, use: Use, given: Given, label: str) -> Built:
        """Return what ``use`` means; ``given`` overrides the values written in it.

        A value is named ``parameter``, or ``label.parameter`` as in a longer expression.
        """
        template, folder = self.template(use)
        written = {key: node_of(value, use.places.get(key)) for key, value in use.values.items()}
        outside = {key.removeprefix(f"{label}.") if key not in template.parameters else key: node
                   for key, node in given.items()}
        return self.below(folder).instance(template, {**written, **outside})

    def instance(self, template: Template, given: Given) -> Built:
        """Return a template with values as a composition."""
        if template.kind == "technique":
            technique = template.technique(given, self.expand)
            parameters = _with_defaults(template.parameters, technique.values)
            return Built(CompositionSpec.of(technique), parameters)
        if template.kind == "macro":
            raise SpecError(f"{template.name!r} is a macro: a function inside a technique, not a "
                            "technique", mark=template.body.mark)
        own = {key: node for key, node in given.items() if key in template.parameters}
        rest = {key: node for key, node in given.items() if key not in own}
        file, text = template.composition(own)
        joint = _Joint(self, rest)
        for use, node in zip(file.members, text.value["members"].value, strict=True):
            joint.add_member(use, node)
        return joint.finish_file(template, file)


@dataclass(slots=True)
class _Joint:
    """A composition in the making: members so far, and the values not yet given out."""

    assembly: Assembly
    rest: Given
    members: list[Member] = field(default_factory=list)
    couplings: list[CouplingSpec] = field(default_factory=list)
    procedures: list[ProcedureSpec] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, term: Term) -> tuple[str, ...]:
        """Add a term of an expression; return the names of its members."""
        if isinstance(term, Use):
            taken = {*self.groups, *(member.name for member in self.members)}
            template, _ = self.assembly.template(term)
            label = _free(template.name, taken)
            built = self.assembly.use(term, self.values_for(label), label)
            return self.take(built, label, rename=template.kind == "technique")
        known = self.assembly.known.get(term.name)
        if known is not None and known.kind != "macro":
            raise SpecError(f"{term.name!r} is a {known.kind}, not a coupling: it takes values by "
                            f"name, as in {term.name}(parameter=value)", mark=term.mark)
        members = tuple(name for inner in term.terms for name in self.add(inner))
        self.couplings.append(_coupling(term, members))
        return members

    def add_member(self, use: MemberUse, node: Node) -> None:
        """Add a member of a composition file; ``node`` is its text."""
        at = node.value["use"].mark
        name = use.name or _only_name(self.assembly, use.use, at)
        if name in self.groups:
            raise SpecError(f"two members share the name {name!r}", mark=node.mark)
        given: Given = dict(node.value["with"].value) if use.with_ else {}
        computed = {key: item.computed for key, item in given.items() if item.computed}
        for key, value in self.values_for(name).items():
            if key in computed:
                raise SpecError(f"'{name}.{key}' is computed by the composition from "
                                f"{computed[key]!r}; set that parameter", mark=value.mark)
            given[key] = value
        built = self.assembly.below(self.assembly.folder).expression(use.use, given, at)
        self.take(built, name, rename=True, hidden=computed)

    def values_for(self, label: str) -> Given:
        """Give out the values named ``label.*``."""
        start = f"{label}."
        mine = {key: node for key, node in self.rest.items() if key.startswith(start)}
        self.rest = {key: node for key, node in self.rest.items() if key not in mine}
        return {key.removeprefix(start): node for key, node in mine.items()}

    def take(self, built: Built, label: str, *, rename: bool,
             hidden: Iterable[str] = ()) -> tuple[str, ...]:
        """Add what was built; return the names its members got.

        Args:
            built: a technique, or a composition to inline.
            label: what it is called here.
            rename: name its members after ``label``; else they keep their names where free.
            hidden: parameters that cannot be set from outside.
        """
        spec, taken = built.spec, {member.name for member in self.members}
        names: dict[str, str] = {}
        for member in spec.members:
            wanted = label if len(spec.members) == 1 else f"{label}_{member.name}"
            names[member.name] = _free(wanted if rename else member.name, taken)
            taken.add(names[member.name])
            self.members.append(Member(name=names[member.name], technique=member.technique))
        for coupling in spec.couplings:
            targets = coupling.members or tuple(names)
            renamed = tuple(names[name] for name in targets)
            self.couplings.append(coupling.model_copy(update={"members": renamed}))
        for procedure in spec.procedures:
            renamed = _renamed_in(procedure, names)
            if renamed not in self.procedures:
                self.procedures.append(renamed)
        self.groups[label] = tuple(names.values())
        skip = set(hidden)
        self.parameters |= {f"{label}.{key}": parameter
                            for key, parameter in built.parameters.items() if key not in skip}
        return self.groups[label]

    def finish(self, name: str) -> Built:
        """Return the composition of an expression."""
        self.refuse_rest(name)
        spec = CompositionSpec(composition=name, members=tuple(self.members),
                               couplings=tuple(self.couplings), procedures=tuple(self.procedures))
        return Built(spec, self.parameters, self.groups)

    def finish_file(self, template: Template, file: CompositionFile) -> Built:
        """Return the composition of a file: its own couplings come after those of members."""
        own = _with_defaults(template.parameters, file.values)
        self.parameters = {**own, **self.parameters}
        self.refuse_rest(file.composition)
        couplings = [*self.couplings, *(self.grouped(item) for item in file.couplings)]
        procedures = [*self.procedures, *file.procedures]
        members = [_at_rate(member, file.learning_rate) for member in self.members]
        spec = CompositionSpec(
            composition=file.composition, reference=file.reference, values=file.values,
            members=tuple(members), couplings=tuple(couplings), procedures=tuple(procedures))
        return Built(spec, self.parameters, self.groups)

    def grouped(self, coupling: CouplingSpec) -> CouplingSpec:
        """Return the coupling with member uses replaced by the members they became."""
        for name in coupling.members:
            if name not in self.groups:
                raise SpecError(unknown_name("member", name, self.groups), mark=coupling.mark)
        members = tuple(name for use in coupling.members for name in self.groups[use])
        return coupling.model_copy(update={"members": members})

    def refuse_rest(self, name: str) -> None:
        """Raise for the first value that nothing takes."""
        for key, node in self.rest.items():
            message = unknown_name(f"parameter of {name}", key, self.parameters)
            raise SpecError(message, mark=node.mark)


def _coupling(term: Coupled, members: tuple[str, ...]) -> CouplingSpec:
    if "members" in term.arguments:
        raise SpecError(f"the members of {term.name!r} are its positional arguments",
                        mark=term.mark)
    return CouplingSpec(name=term.name, members=members, arguments=term.arguments, mark=term.mark)


def _only_name(assembly: Assembly, text: str, at: Mark | None) -> str:
    """Return the default name of a member; only a single technique or composition has one."""
    terms = parse_expression(text, at)
    if len(terms) == 1 and isinstance(terms[0], Use):
        return assembly.label(terms[0])
    raise SpecError("a member made of several techniques needs a 'name'", mark=at)


def _free(name: str, taken: Iterable[str]) -> str:
    """Return ``name``, or ``name_2``, ``name_3``, ... where it is taken."""
    used, count, free = set(taken), 1, name
    while free in used:
        count += 1
        free = f"{name}_{count}"
    return free


def _renamed_in(procedure: ProcedureSpec, names: Mapping[str, str]) -> ProcedureSpec:
    """Return a procedure that calls members by their new names, wherever a list names them."""

    def renamed(value: JsonValue, key: str) -> JsonValue:
        if isinstance(value, dict):
            return {inner: renamed(item, inner) for inner, item in value.items()}
        if isinstance(value, list):
            return [renamed(item, key) for item in value]
        if isinstance(value, str) and key in _NAMES_MEMBERS:
            member, colon, rest = value.partition(":")
            return f"{names.get(member, member)}{colon}{rest}"
        return value

    arguments = {key: renamed(value, key) for key, value in procedure.arguments.items()}
    return procedure.model_copy(update={"arguments": arguments})


def _with_defaults(parameters: Mapping[str, Parameter],
                   values: Mapping[str, ParameterValue]) -> dict[str, Parameter]:
    return {name: parameter.model_copy(update={"default": values[name]})
            for name, parameter in parameters.items()}


def _at_rate(member: Member, rate: LearningRate | None) -> Member:
    if rate is None:
        return member
    technique = member.technique.model_copy(update={"learning_rate": rate})
    return member.model_copy(update={"technique": technique})

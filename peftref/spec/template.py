"""A specification file before its parameters have values.

`Template.read` checks what is true for all values: known fields, sound parameters, every declared
parameter used and every used one declared. `Template.technique`, `.composition` and `.function`
put values in: ``$name`` and ``${arithmetic}`` are replaced, ``choose`` picks its branch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from peftref.errors import Mark, SpecError, unknown_name
from peftref.spec.arithmetic import evaluate, names_in
from peftref.spec.canonical import canonical_composition, canonical_technique
from peftref.spec.composition import CompositionFile
from peftref.spec.functions import MacroExpander
from peftref.spec.loader import Node, node_of, plain, validated
from peftref.spec.parameter import Parameter, ParameterValue
from peftref.spec.technique import TechniqueSpec

__all__ = ["KINDS", "Kind", "Template"]

Kind = Literal["technique", "composition", "macro"]

KINDS: Mapping[Kind, tuple[str, ...]] = {
    "technique": ("technique", "reference", "parameters", "learning_rate", "optimiser_groups",
                  "modules", "procedures"),
    "composition": ("composition", "reference", "parameters", "learning_rate", "members",
                    "couplings", "procedures"),
    "macro": ("macro", "reference", "parameters", "function"),
}
_PLACEHOLDER = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<sum>[^}]*)\}|(?P<name>[A-Za-z_]\w*))")


@dataclass(frozen=True, slots=True)
class Template:
    """A technique, composition or macro with open parameters.

    Attributes:
        kind: which of the three.
        name: what the file calls it.
        parameters: its typed parameters by name.
        body: all fields of the file but ``parameters``, placeholders unreplaced.
    """

    kind: Kind
    name: str
    parameters: Mapping[str, Parameter]
    body: Node

    @classmethod
    def read(cls, document: Node) -> Template:
        """Return the template that ``document`` holds.

        Raises:
            SpecError: at the place of an unknown field, an unsound parameter, or a parameter that
                is declared and never used or used and not declared.
        """
        kind, name = _kind_and_name(document)
        for key in document.value:
            if key not in KINDS[kind]:
                message = unknown_name(f"field of a {kind}", key, KINDS[kind])
                raise SpecError(message, mark=document.keys.get(key))
        declared = document.value.get("parameters", Node({}))
        if not declared.is_mapping:
            raise SpecError("'parameters' is a mapping of names to parameters", mark=declared.mark)
        parameters: dict[str, Parameter] = {}
        for key, node in declared.value.items():
            if not key.isidentifier():
                raise SpecError(f"parameter name {key!r} is no identifier",
                                mark=declared.keys.get(key))
            parameters[key] = validated(Parameter, node)
        body = {key: node for key, node in document.value.items() if key != "parameters"}
        template = cls(kind, name, parameters, document.replaced(body))
        template._check_use(declared)
        return template

    def _check_use(self, declared: Node) -> None:
        used: set[str] = set()
        for name, mark in _placeholders(self.body):
            if name not in self.parameters:
                raise SpecError(unknown_name("parameter", name, self.parameters), mark=mark)
            used.add(name)
        for name in self.parameters:
            if name not in used:
                raise SpecError(f"parameter {name!r} is declared and never used; write ${name} "
                                "where it belongs, or delete it", mark=declared.keys.get(name))

    def bind(self, given: Mapping[str, Node]) -> dict[str, ParameterValue]:
        """Return the value of every parameter: given, or its default.

        Raises:
            SpecError: an unknown parameter, or a value that its parameter does not allow.
        """
        for name, node in given.items():
            if name not in self.parameters:
                message = unknown_name(f"parameter of {self.name}", name, self.parameters)
                raise SpecError(message, mark=node.mark)
        values: dict[str, ParameterValue] = {}
        for name, parameter in self.parameters.items():
            node = given.get(name, Node(parameter.default))
            try:
                values[name] = parameter.checked(plain(node))
            except ValueError as error:
                raise SpecError(f"{self.name}: parameter {name!r} {error}",
                                mark=node.mark) from error
        return values

    def technique(self, given: Mapping[str, Node], expand: MacroExpander) -> TechniqueSpec:
        """Return the technique with the values in ``given``, macros replaced by ``expand``."""
        body = self.resolved(given)
        content = {**body.value, "values": node_of(self.bind(given))}
        return validated(TechniqueSpec, canonical_technique(body.replaced(content), expand))

    def composition(self, given: Mapping[str, Node]) -> tuple[CompositionFile, Node]:
        """Return the composition file with the values in ``given``, and its text with them in.

        The members are not read: they are names, paths and expressions.
        """
        body = self.resolved(given)
        content = {**body.value, "values": node_of(self.bind(given))}
        file = validated(CompositionFile, canonical_composition(body.replaced(content)))
        return file, body

    def function(self, arguments: Node) -> Node:
        """Return the function that this macro stands for at a use with ``arguments``."""
        return self.resolved(arguments.value).value["function"]

    def resolved(self, given: Mapping[str, Node]) -> Node:
        """Return the body with every placeholder replaced and every ``choose`` decided.

        Raises:
            SpecError: as `bind`; arithmetic that cannot be computed; a value that only a branch
                reads that was not chosen.
        """
        values = self.bind(given)
        resolver = _Resolver(self.parameters, values)
        body = resolver.resolve(self.body)
        for name, node in given.items():
            if name not in resolver.used and values[name] != self.parameters[name].default:
                raise SpecError(f"{self.name}: {name}={values[name]!r} has no effect: only a "
                                "branch that is not chosen reads it", mark=node.mark)
        return body


def _kind_and_name(document: Node) -> tuple[Kind, str]:
    found: list[Kind] = [kind for kind in KINDS if kind in document.value]
    if len(found) != 1:
        raise SpecError("a file has exactly one of the fields 'technique', 'composition', "
                        f"'macro'; found {', '.join(found) or 'none'}", mark=document.mark)
    kind = found[0]
    name = document.value[kind]
    if {"backbone", "data"} & set(document.value):
        raise SpecError("this is a run file, not a specification; train it with peftref train, or "
                        "search it with peftref search", mark=document.mark)
    if not isinstance(name.value, str) or not name.value.isidentifier():
        raise SpecError(f"a {kind} is named by an identifier, not {plain(name)!r:.60}",
                        mark=name.mark)
    return kind, name.value


def _placeholders(node: Node) -> Iterator[tuple[str, Mark | None]]:
    """Yield name and place of every parameter that the text in ``node`` reads."""
    if isinstance(node.value, dict):
        for item in node.value.values():
            yield from _placeholders(item)
    elif isinstance(node.value, tuple):
        for item in node.value:
            yield from _placeholders(item)
    elif isinstance(node.value, str):
        for found in _PLACEHOLDER.finditer(node.value):
            if found["name"]:
                yield found["name"], node.mark
            elif found["sum"] is not None:
                try:
                    names = names_in(found["sum"])
                except ValueError as error:
                    raise SpecError(str(error), mark=node.mark) from error
                yield from ((name, node.mark) for name in sorted(names))


class _Resolver:
    """Replaces placeholders; remembers which parameters had an effect."""

    def __init__(self, parameters: Mapping[str, Parameter],
                 values: Mapping[str, ParameterValue]) -> None:
        self.parameters = parameters
        self.values = values
        self.used: set[str] = set()

    def resolve(self, node: Node) -> Node:
        if node.is_mapping:
            if set(node.value) == {"choose"}:
                return self.resolve(self._branch(node.value["choose"]))
            return node.replaced({key: self.resolve(item) for key, item in node.value.items()})
        if isinstance(node.value, tuple):
            return node.replaced([self.resolve(item) for item in node.value])
        if isinstance(node.value, str):
            return self._text(node)
        return node

    def _branch(self, node: Node) -> Node:
        """Return the branch of a ``choose`` that the value of ``by`` names."""
        if not node.is_mapping or "by" not in node.value:
            raise SpecError("'choose' is a mapping of 'by' and branches", mark=node.mark)
        by = node.value["by"]
        branches = {key: item for key, item in node.value.items() if key != "by"}
        parameter = self.parameters.get(str(by.value).removeprefix("$"))
        if parameter is not None and parameter.choices is not None:
            for name in branches:
                if name not in [_branch_name(choice) for choice in parameter.choices]:
                    known = map(_branch_name, parameter.choices)
                    raise SpecError(unknown_name("branch", name, known), mark=node.keys.get(name))
        value = _branch_name(plain(self.resolve(by)))
        if value not in branches:
            raise SpecError(f"'choose' has no branch {value!r}; branches: {', '.join(branches)}",
                            mark=node.mark)
        return branches[value]

    def _text(self, node: Node) -> Node:
        text, mark = node.value, node.mark
        if not _PLACEHOLDER.search(text):
            return node
        whole = _PLACEHOLDER.fullmatch(text)
        if whole:
            return replace(node_of(self._value(whole, mark), mark), computed=text)
        parts = _PLACEHOLDER.sub(lambda found: _branch_name(self._value(found, mark)), text)
        return Node(parts, mark, computed=text)

    def _value(self, found: re.Match[str], mark: Mark | None) -> ParameterValue:
        if found["dollar"]:
            return "$"
        if found["name"]:
            self.used.add(found["name"])
            return self.values[found["name"]]
        self.used |= names_in(found["sum"])
        scalars = {key: v for key, v in self.values.items() if not isinstance(v, tuple)}
        try:
            return evaluate(found["sum"], scalars)
        except ValueError as error:
            raise SpecError(str(error), mark=mark) from error


def _branch_name(value: object) -> str:
    """Return ``value`` as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)

"""The language: specifications as YAML, expressions and typed data. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftref.errors import SpecError
from peftref.spec.assembly import Assembly, Built
from peftref.spec.canonical import canonical_composition, canonical_technique
from peftref.spec.composition import CompositionSpec
from peftref.spec.loader import Node, node_of, parse_yaml, read_yaml, to_text, validated
from peftref.spec.parameter import Parameter
from peftref.spec.technique import TechniqueSpec
from peftref.spec.template import Template

__all__ = ["load", "parameters", "to_yaml"]

Source = str | Path | Mapping[str, Any] | TechniqueSpec | CompositionSpec


def load(source: Source, /, **values: object) -> CompositionSpec:
    """Return a composition with its parameters set.

    Args:
        source: a name, an expression, a path, YAML text, a mapping (of a specification file or of
            a resolved spec), or a spec, which is returned as it is.
        values: parameters: ``rank=4``; a member's as ``**{"lora.rank": 4}``.

    Raises:
        SpecError: what is wrong, where, and what would be valid.
    """
    return _built(source, values).spec


def parameters(source: Source, **values: object) -> Mapping[str, Parameter]:
    """Return the parameters that ``load(source, **values)`` takes; defaults are what it uses.

    Raises:
        SpecError: as `load`.
    """
    return _built(source, values).parameters


def to_yaml(spec: CompositionSpec) -> str:
    """Return ``spec`` as YAML that `load` reads back equal; it refers to no other file."""
    data = spec.model_dump(mode="json", exclude_defaults=True)
    for member in data["members"]:
        member["technique"].setdefault("values", {})
    return to_text(data)


def _built(source: Source, values: Mapping[str, object]) -> Built:
    given = {key: node_of(value) for key, value in values.items()}
    match source:
        case TechniqueSpec():
            return _resolved(CompositionSpec.of(source), given)
        case CompositionSpec():
            return _resolved(source, given)
        case Path():
            return _document(read_yaml(source), given, source.parent)
        case str() if "\n" in source.strip() or source.lstrip().startswith("{"):
            return _document(parse_yaml(source, "<text>"), given, Path())
        case str() if source.strip().endswith((".yaml", ".yml")) and not source.startswith("'"):
            path = Path(source.strip()).expanduser()
            return _document(read_yaml(path), given, path.parent)
        case str():
            return Assembly().expression(source, given)
        case Mapping():
            return _document(node_of(source), given, Path())
        case _:
            raise SpecError("a specification is a name, an expression, a path, YAML text, a "
                            f"mapping or a spec, not {type(source).__name__}")


def _document(node: Node, given: dict[str, Node], folder: Path) -> Built:
    """Return what a specification file or a resolved spec holds."""
    members = node.value.get("members", Node(()))
    items = members.value if isinstance(members.value, tuple) else ()
    if any(item.is_mapping and "technique" in item.value for item in items):
        spec = validated(CompositionSpec, canonical_composition(node))
        return _resolved(spec, given)
    if "technique" in node.value and "values" in node.value:
        technique = validated(TechniqueSpec, canonical_technique(node, lambda *_: None))
        return _resolved(CompositionSpec.of(technique), given)
    return Assembly(folder).instance(Template.read(node), given)


def _resolved(spec: CompositionSpec, given: Mapping[str, Node]) -> Built:
    if given:
        raise SpecError(f"{spec.composition!r} is resolved: its parameters have their values; "
                        f"load it by name to set {', '.join(given)}")
    return Built(spec, {})

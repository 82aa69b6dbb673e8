"""JSON schemas of specification files, for editors (``# yaml-language-server: $schema=...``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from peftref.spec.catalogue import entries
from peftref.spec.composition import CompositionFile
from peftref.spec.parameter import Parameter
from peftref.spec.technique import (
    COMBINATORS,
    LearningRate,
    ModuleSpec,
    OptimiserGroup,
    Reference,
    TechniqueSpec,
)
from peftref.spec.template import KINDS, Kind

__all__ = ["json_schema"]

Schema = dict[str, Any]

# Any value may be a parameter: $name, ${arithmetic}, or text around them; any part a choice.
_PLACEHOLDER: Schema = {"type": "string", "pattern": r"\$"}
_CHOOSE: Schema = {
    "type": "object", "required": ["choose"], "additionalProperties": False,
    "properties": {"choose": {"type": "object", "required": ["by"]}},
}
_MODELS: Sequence[type[BaseModel]] = (
    LearningRate, ModuleSpec, OptimiserGroup, Reference, TechniqueSpec, CompositionFile,
)


def json_schema(
    kind: Kind,
    *,
    primitives: Sequence[str] = (),
    couplings: Sequence[str] = (),
    procedures: Sequence[str] = (),
) -> Schema:
    """Return the JSON schema of a kind of file.

    Args:
        kind: technique, composition or macro.
        primitives: names that a function may have, beside combinators and macros; none: any.
        couplings: names of couplings; none: any.
        procedures: names of procedures; none: any.
    """
    definitions: Schema = {}
    for model in _MODELS:
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        definitions[model.__name__] = schema
    definitions = {name: _open(part) for name, part in definitions.items()}
    functions = [*primitives, *COMBINATORS, *entries("macro")] if primitives else []
    definitions["Expression"] = {"anyOf": [
        *_calls(functions),
        {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Expression"}},
    ]}
    definitions["CouplingSpec"] = {"anyOf": _calls(couplings)}
    definitions["ProcedureSpec"] = {"anyOf": _calls(procedures)}
    integration = definitions["Integration"]
    kinds = definitions["IntegrationKind"]
    definitions["Integration"] = {"anyOf": [kinds, integration]}
    definitions["Positions"] = {"anyOf": [{"const": "special"}, definitions["Positions"]]}
    definitions["Parameter"] = Parameter.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"peftref {kind}",
        "type": "object",
        "additionalProperties": False,
        "required": [kind, {"technique": "modules", "composition": "members",
                            "macro": "function"}[kind]],
        "properties": _properties(kind, definitions),
        "$defs": definitions,
    }


def _properties(kind: Kind, definitions: Schema) -> Schema:
    """Return the schema of each field that a file of ``kind`` has."""
    model = "CompositionFile" if kind == "composition" else "TechniqueSpec"
    known = definitions[model]["properties"]
    special: Schema = {
        "macro": {"type": "string"},
        "function": {"$ref": "#/$defs/Expression"},
        "parameters": {"type": "object", "description": "Typed parameters, read as $name.",
                       "additionalProperties": {"$ref": "#/$defs/Parameter"}},
    }
    return {field: special.get(field) or known[field] for field in KINDS[kind]}


def _calls(names: Sequence[str]) -> list[Schema]:
    """Return the forms ``name`` and ``{name: ...}``."""
    body: Schema = {"type": ["object", "array", "null"]}
    call: Schema = {"type": "object", "minProperties": 1, "maxProperties": 1}
    if not names:
        return [{"type": "string"}, call]
    known = sorted(set(names))
    closed: Schema = {"properties": dict.fromkeys(known, body), "additionalProperties": False}
    return [{"enum": known}, {**call, **closed}, _CHOOSE]


def _open(schema: Any) -> Any:  # noqa: ANN401 - JSON schema is plain nested data
    """Return the schema with a placeholder or a ``choose`` accepted wherever a value is."""
    if isinstance(schema, list):
        return [_open(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _open(part) for key, part in schema.items()}
    if "properties" in schema:
        changed["properties"] = {key: {"anyOf": [_open(part), _PLACEHOLDER, _CHOOSE]}
                                 for key, part in schema["properties"].items()}
    return changed

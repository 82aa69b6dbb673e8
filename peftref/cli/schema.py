"""``peftref schema``: JSON schemas for editors, made from the models that read the files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel

from peftref.cli.style import print_json

__all__ = ["SchemaKind", "command", "schema_of"]

SchemaKind = Literal["technique", "composition", "macro", "run", "search"]

# Any value of a specification may be a parameter: $name, ${arithmetic} or text around them.
PLACEHOLDER = {"type": "string", "pattern": r"\$"}
CHOICE = {"type": "object", "required": ["choose"], "additionalProperties": False, "properties": {
    "choose": {"type": "object", "required": ["by"]}}}
CALL = {"type": "object", "minProperties": 1, "maxProperties": 1}
# These are read from shorter forms than their models have.
WRITTEN: dict[str, dict[str, Any]] = {
    "Expression": {
        "description": "A name, {name: {argument: value}}, {combinator: [functions]} or a list "
        "(a chain).",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Expression"}},
            CALL,
        ],
    },
    "ProcedureSpec": {
        "description": "A name, or {name: {argument: value}}.",
        "anyOf": [{"type": "string"}, CALL],
    },
    "CouplingSpec": {
        "description": "A name, or {name: {members: [...], argument: value}}.",
        "anyOf": [{"type": "string"}, CALL],
    },
}
# Short forms that stand beside the model's own.
SHORT: dict[str, dict[str, Any]] = {
    "Integration": {"type": "string"},
    "DataSettings": {"type": "string"},
    "Choice": {"type": "string"},
}


def command(
    kind: Annotated[SchemaKind, typer.Argument(help="Which kind of file.")],
) -> None:
    """Print the JSON schema of a kind of file.

    Editors with a YAML language server use it for completion and checking when a file starts
    with the line `# yaml-language-server: $schema=PATH`; `peftref init` writes both.
    """
    print_json(schema_of(kind))


def schema_of(kind: SchemaKind) -> dict[str, Any]:
    """Return the JSON schema of a kind of file, as plain data."""
    if kind == "run":
        from peftref.training.settings import RunSettings

        return _run_schema(RunSettings)
    if kind == "search":
        from peftref.search.settings import SearchRun

        return _run_schema(SearchRun)
    return _specification_schema(kind)


def _run_schema(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    _accept_short_forms(schema)
    return schema


def _specification_schema(kind: Literal["technique", "composition", "macro"]) -> dict[str, Any]:
    from pydantic import TypeAdapter

    from peftref.spec.composition import CompositionFile
    from peftref.spec.parameter import Parameter
    from peftref.spec.technique import Expression, Reference, TechniqueSpec
    from peftref.spec.template import KINDS

    if kind == "macro":
        schema: dict[str, Any] = {
            "$defs": {
                "Reference": Reference.model_json_schema(),
                "Expression": TypeAdapter(Expression).json_schema()["$defs"]["Expression"],
            },
            "properties": {
                "macro": {"type": "string"},
                "reference": {"$ref": "#/$defs/Reference"},
                "function": {"$ref": "#/$defs/Expression"},
            },
            "required": ["macro", "function"],
        }
    else:
        model = TechniqueSpec if kind == "technique" else CompositionFile
        schema = model.model_json_schema()
    schema["properties"] = {
        name: part for name, part in schema["properties"].items() if name in KINDS[kind]
    }
    schema = _with_placeholders(schema)
    for name, written in WRITTEN.items():
        if name in schema.get("$defs", {}):
            schema["$defs"][name] = written
    _accept_short_forms(schema)
    schema["$defs"]["Parameter"] = Parameter.model_json_schema()
    schema["properties"]["parameters"] = {
        "type": "object",
        "description": "Typed parameters, read as $name.",
        "additionalProperties": {"$ref": "#/$defs/Parameter"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"peftref {kind}",
        "type": "object",
        "additionalProperties": False,
        **{key: schema[key] for key in ("properties", "required", "$defs")},
    }


def _accept_short_forms(schema: dict[str, Any]) -> None:
    for name, short in SHORT.items():
        definition = schema.get("$defs", {}).get(name)
        if definition is not None:
            schema["$defs"][name] = {"anyOf": [short, definition]}


def _with_placeholders(schema: Any) -> Any:  # noqa: ANN401 - JSON schema is plain nested data
    """Return the schema with a placeholder accepted for every value, a choice for every object."""
    if isinstance(schema, list):
        return [_with_placeholders(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") in {"integer", "number", "boolean"} or "enum" in schema:
        return {"anyOf": [schema, PLACEHOLDER]}
    changed = {key: _with_placeholders(part) for key, part in schema.items()}
    if "$ref" in schema or (schema.get("type") == "object" and "properties" not in schema):
        return {"anyOf": [changed, CHOICE]}
    return changed

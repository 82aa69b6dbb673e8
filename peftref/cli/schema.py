"""``peftref schema``: JSON schemas for editors, made from the models that read the files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from peftref.cli.style import print_json
from peftref.registry import couplings, primitives, procedures
from peftref.spec.schema import json_schema

__all__ = ["SchemaKind", "command", "schema_of"]

SchemaKind = Literal["technique", "composition", "macro", "run", "search"]

# What a run file may write as one word, beside its full form.
SHORT = ("DataSettings", "Choice")


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
    if kind in ("run", "search"):
        return _run_schema(kind)
    return json_schema(
        kind,
        primitives=primitives.names(),
        couplings=couplings.names(),
        procedures=procedures.names(),
    )


def _run_schema(kind: Literal["run", "search"]) -> dict[str, Any]:
    if kind == "run":
        from peftref.training.settings import RunSettings as Model
    else:
        from peftref.search.settings import SearchRun as Model
    schema = Model.model_json_schema()
    for name in SHORT:
        if name in schema["$defs"]:
            schema["$defs"][name] = {"anyOf": [{"type": "string"}, schema["$defs"][name]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

"""``peftref init``: a file to start from, with its schema for the editor."""

from __future__ import annotations

import json as json_format
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftref.cli.schema import schema_of
from peftref.cli.style import note, print_text
from peftref.errors import SpecError

__all__ = ["StartKind", "command", "template_text"]

StartKind = Literal["run", "search", "technique", "composition"]


def command(
    kind: Annotated[StartKind, typer.Argument(help="What to start.")] = "run",
    path: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Where to write it; without it, KIND.yaml."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files.")] = False,
) -> None:
    """Write a commented file to start from, and its JSON schema beside it.

    A technique or composition is named for its file.
    """
    target = path or Path(f"{kind}.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise SpecError(f"{target}: the file's name must end with .yaml or .yml")
    schema = target.with_name(f"{kind}.schema.json")
    if target.exists() and not force:
        raise SpecError(f"{target} exists; give another name, or --force to overwrite it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json_format.dumps(schema_of(kind), indent=1)
        schema.write_text(f"{text}\n", encoding="utf-8")
        target.write_text(template_text(kind, target, schema.name), encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{target}: cannot be written ({error.strerror})") from error
    print_text(str(target))
    verbs = {"run": "train", "search": "search"}
    note(f"Edit it, then: peftref {verbs.get(kind, 'check')} {target}")


def template_text(kind: StartKind, path: Path, schema: str) -> str:
    """Return the commented file, with the line that tells editors its schema."""
    text = files("peftref.cli").joinpath("templates", f"{kind}.yaml").read_text(encoding="utf-8")
    name = re.sub(r"\W", "_", path.stem)
    if path.stem != kind and name.isidentifier():
        text = text.replace(f"my_{kind}", name)
    return f"# yaml-language-server: $schema={schema}\n{text}"

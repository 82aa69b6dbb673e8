"""``peftref list``: what can be named in a specification."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from peftref.cli.style import note, print_json, print_table
from peftref.errors import SpecError
from peftref.registry import Registry, couplings, primitives, procedures
from peftref.spec.catalogue import Entry, entries
from peftref.spec.loader import plain
from peftref.spec.template import Template

__all__ = ["command"]

ListedKind = Literal[
    "technique", "composition", "macro", "primitive", "coupling", "procedure", "all"
]
ORDER = ("technique", "composition", "macro")
REGISTRIES = {"primitive": primitives, "coupling": couplings, "procedure": procedures}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``places`` are site patterns, or members of a composition."""

    name: str
    kind: str
    title: str
    url: str | None
    places: tuple[str, ...]
    parameters: dict[str, object]
    path: str | None


def command(
    kind: Annotated[
        ListedKind | None,
        typer.Option(help="What to list; without it, techniques and compositions."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """List techniques and compositions, or the words that they are written with.

    Your own files are listed with the shipped ones: PEFTREF_CATALOGUE names their folders.
    """
    rows, broken = _catalogue_rows(kind)
    rows += [row for name, registry in REGISTRIES.items() if kind in (name, "all")
             for row in _registered(name, registry)]
    if json:
        print_json([asdict(row) for row in rows])
    else:
        print_table(
            ("name", "kind", "sites or members", "parameters", "about"),
            ((row.name, row.kind, ", ".join(row.places), _values(row), row.title) for row in rows),
        )
    for message in broken:
        note(f"error: {message}")
    if broken:
        raise typer.Exit(2)


def _catalogue_rows(kind: ListedKind | None) -> tuple[list[Row], list[str]]:
    """Return the rows of the files, and what is wrong with those that cannot be read."""
    rows: list[Row] = []
    broken: list[str] = []
    for entry in entries().values():
        if kind not in (entry.kind, "all") and (kind is not None or entry.kind == "macro"):
            continue
        try:
            rows.append(_row(entry))
        except SpecError as error:
            broken.append(str(error))
    rows.sort(key=lambda row: ORDER.index(row.kind))
    return rows, broken


def _row(entry: Entry) -> Row:
    template = entry.template
    body = plain(template.resolved({}))
    reference = body.get("reference") or {}
    return Row(
        name=entry.name,
        kind=entry.kind,
        title=reference.get("paper", ""),
        url=reference.get("url"),
        places=tuple(dict.fromkeys(_places(template, body))),
        parameters={name: parameter.default for name, parameter in template.parameters.items()},
        path=str(entry.path),
    )


def _places(template: Template, body: dict[str, list[dict[str, object]]]) -> Iterator[str]:
    if template.kind == "composition":
        for member in body.get("members", []):
            yield str(member.get("use", ""))
    for module in body.get("modules", []):
        site = module.get("site")
        if isinstance(site, dict):
            port = site.get("port", "output")
            text = str(site.get("select") or site.get("module"))
            yield text if port == "output" else f"{text}.{port}"


def _registered(kind: str, registry: Registry[type]) -> Iterator[Row]:
    for name in registry.names():
        entry = registry.get(name)
        title = (inspect.getdoc(entry) or "").split("\n", 1)[0]
        arguments = getattr(getattr(entry, "Arguments", None), "model_fields", {})
        parameters: dict[str, object] = {
            key: None if field.is_required() else field.default for key, field in arguments.items()
            if key != "name"
        }
        yield Row(name, kind, title, None, (), parameters, None)


def _values(row: Row) -> str:
    return ", ".join(
        key if value is None else f"{key}={_plain(value)}" for key, value in row.parameters.items()
        if key not in ("site", "layers")
    )


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

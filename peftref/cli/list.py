"""``peftref list``: what can be named in a specification."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from peftref.cli.facts import Facts, digest, known_facts, listed
from peftref.cli.style import count, note, print_json, print_table
from peftref.errors import SpecError, unknown_name
from peftref.registry import Registry, couplings, primitives, procedures
from peftref.spec.catalogue import Entry, entries

__all__ = ["command"]

ListedKind = Literal[
    "technique", "composition", "macro", "primitive", "coupling", "procedure", "all"
]
ORDER = ("technique", "composition", "macro")
REGISTRIES = {"primitive": primitives, "coupling": couplings, "procedure": procedures}


COLUMNS = ("workspace", "intra_connectivity", "inter_connectivity", "parameters_adapted",
           "sharing", "input_type", "insertion", "integration")
FLAGS = ("mergeable", "identity", "generates", "merged", "peft", "vllm")


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
    derived: Facts | None = None


def command(
    kind: Annotated[
        ListedKind | None,
        typer.Option(help="What to list; without it, techniques and compositions."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Only entries for which all of these hold, such as "
                     "mergeable,workspace=ffn or !identity,insertion=parallel."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """List techniques and compositions, or the words that they are written with.

    Your own files are listed with the shipped ones: PEFTREF_CATALOGUE names their folders.
    What the compiler derived of the shipped ones can be asked for with --where.
    """
    conditions = _conditions(where)
    rows, broken = _catalogue_rows(kind)
    rows = [row for row in rows if all(holds(row) for holds in conditions)]
    if not conditions:
        rows += [row for name, registry in REGISTRIES.items() if kind in (name, "all")
                 for row in _registered(name, registry)]
    if json:
        print_json([asdict(row) for row in rows])
    elif kind in (None, "technique", "composition"):
        print_table(
            ("name", "workspace", "inside", "insertion", "integration",
             "merges", "identity", "BERT-base", "about"),
            (_derived_cells(row) for row in rows), right=("BERT-base",),
        )
    else:
        print_table(
            ("name", "kind", "sites or members", "parameters", "about"),
            ((row.name, row.kind, ", ".join(row.places), _values(row), row.title) for row in rows),
        )
    for message in broken:
        note(f"error: {message}")
    if broken:
        raise typer.Exit(2)


def _derived_cells(row: Row) -> tuple[str, ...]:
    facts = row.derived or {}
    told = [dict[str, str](part) for part in facts.get("typology", [])]

    def joined(column: str) -> str:
        return ", ".join(dict.fromkeys(part[column] for part in told))

    found = facts.get("counts", {}).get("bert-base")
    return (
        row.name, joined("workspace"), joined("intra_connectivity"),
        joined("insertion"), joined("integration"), _yes(facts.get("mergeable")),
        _yes(facts.get("identity")), count(found) if isinstance(found, int) else "", row.title,
    )


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _conditions(where: str | None) -> list[Callable[[Row], bool]]:
    """Return the tests that ``--where`` asks for.

    Raises:
        SpecError: a name is neither a flag nor a column.
    """
    return [_condition(part.strip()) for part in (where or "").split(",") if part.strip()]


def _condition(text: str) -> Callable[[Row], bool]:
    name, equals, value = (part.strip() for part in text.removeprefix("!").partition("="))
    wanted = not text.startswith("!")
    if equals and name in (*COLUMNS, "procedures", "couplings", "kind"):
        return lambda row: (value in _column(row, name)) is wanted
    if not equals and name in FLAGS:
        return lambda row: row.derived is not None and _flag(row.derived, name) is wanted
    raise SpecError(
        f"--where {text!r}: {unknown_name('property', name, (*FLAGS, *COLUMNS))}; a flag stands "
        f"alone ({', '.join(FLAGS)}), a column has a value ({', '.join(COLUMNS)}, kind, "
        "procedures, couplings)"
    )


def _column(row: Row, name: str) -> str:
    facts = row.derived or {}
    if name == "kind":
        return row.kind
    if name in ("procedures", "couplings"):
        return ", ".join(facts.get(name, []))
    return ", ".join(part[name] for part in facts.get("typology", []))


def _flag(facts: Facts, name: str) -> bool:
    if name in ("merged", "peft", "vllm"):
        return name in facts.get("served", [])
    return bool(facts.get(name))


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
    facts = known_facts().get(entry.name) if entry.shipped else None
    known = facts if facts is not None and facts["digest"] == digest(entry) else None
    told = listed(entry) if known is None else known
    return Row(
        name=entry.name,
        kind=entry.kind,
        title=told["title"],
        url=told["url"],
        places=tuple(told["places"]),
        parameters=told["values"],
        path=str(entry.path),
        derived=known and {k: known[k] for k in known if k not in _OWN},
    )


_OWN = ("digest", "kind", "title", "url", "places", "values")


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

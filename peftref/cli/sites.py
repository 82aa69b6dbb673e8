"""The site table of a backbone, for those who write specifications; and its row as a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftref.backbone.family import Family, families, read_family
from peftref.backbone.pattern import expand_braces
from peftref.backbone.site_table import RowSlice, Site, SiteTable
from peftref.cli.style import count, note, print_json, print_table, print_text
from peftref.errors import SpecError
from peftref.spec.loader import to_text

if TYPE_CHECKING:
    from peftref.backbone.infer import Findings
    from peftref.cli.check import TaskName

__all__ = ["check_options", "describe_sites", "show_sites"]

Source = Literal["built-in", "inferred", "given"]
SOURCES: Mapping[Source, str] = {
    "built-in": "by a built-in row",
    "inferred": "inferred; every role was shown by a trial on a small random model of this class",
    "given": "by the row given",
}


def show_sites(
    backbone: str, task: TaskName, sites: Path | None, save: Path | None, *, json: bool
) -> None:
    """Print the site table of a backbone; write its row where ``save`` says.

    Raises:
        SitesError: the sites are not known, and not inferred with certainty.
    """
    if save is not None and save.exists():
        raise SpecError(f"{save} exists; give another name for the row")
    from peftref.backbone.hf import infer, meta_model, site_table

    model = meta_model(backbone, task)
    given = None if sites is None else read_family(sites)
    table = site_table(model, given)
    source: Source = "given" if given else "inferred" if table.row else "built-in"
    found = infer(model) if source == "inferred" else None
    described = describe_sites(table, source, found)
    if json:
        print_json(described)
    else:
        _print(backbone, described)
    if save is not None:
        row = given or families().get(model.config.model_type)
        _save(save, found.text() if found is not None else _text(row) if row else "")
        note(f"wrote {save}")


def check_options(
    specification: str | None, backbone: str | None, *, compiled: bool, yaml: bool, sites: bool,
    save: bool,
) -> None:
    """Refuse options of ``show`` that would have no effect.

    Raises:
        SpecError: says which, and what they need.
    """
    if specification is None and backbone is None:
        raise SpecError("show what? Give a technique, --backbone PATH, or both")
    if backbone is None and (sites or save):
        raise SpecError("--sites and --save are about a backbone: give --backbone PATH too")
    if backbone is None and compiled:
        raise SpecError("--graph, --passes and --after show what is compiled: give --backbone PATH")
    if specification is None and (compiled or yaml):
        raise SpecError("--graph, --passes, --after and --yaml show a technique: give one")
    if specification is not None and save:
        raise SpecError("--save writes the row that is shown without a technique: leave that out")


def describe_sites(
    table: SiteTable, source: Source, found: Findings | None = None
) -> dict[str, Any]:
    """Return the table as plain data; sites that differ in their layer alone are one entry."""
    reasons = {role.removesuffix("?"): finding.why for stack in (found.stacks if found else {})
               .values() for part in stack.sections.values() for finding in part
               for role in expand_braces(finding.role)}
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in table:
        path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.module, count=1)
        module = site.module if site.layer is None else path
        key = (site.stack, site.role, module, site.d_in, site.d_out, site.bias, site.rows)
        groups.setdefault(key, []).append(site)
    return {
        "family": table.family, "source": source, "layers": table.layers,
        "hidden_size": table.hidden_size, "vocabulary": table.vocabulary,
        "norms": "pre" if table.pre_norm else "post", "parameters": table.frozen_parameters,
        "sites": [
            {
                "stack": sites[0].stack, "role": sites[0].role, "sites": len(sites),
                "layers": [site.layer for site in sites if site.layer is not None],
                "module": str(key[2]), "kind": sites[0].kind.value, "d_in": sites[0].d_in,
                "d_out": sites[0].d_out, "bias": sites[0].bias, "rows": _rows(sites[0].rows),
                "ports": sorted(port.value for port in sites[0].ports),
                "why": reasons.get(sites[0].role),
            }
            for key, sites in groups.items()
        ],
    }


def _rows(rows: RowSlice | None) -> str | None:
    if rows is None:
        return None
    span = f"{rows.start}:{rows.start + rows.length}"
    return span if rows.groups == 1 else f"{span} of each {rows.size}, {rows.groups} times"


def _print(backbone: str, found: Mapping[str, Any]) -> None:
    layers = ", ".join(f"{number} {stack} layers" for stack, number in found["layers"].items())
    print_text(
        f"{backbone}: {found['family']}, {layers}, width {found['hidden_size']}, "
        f"{count(found['parameters'])} parameters, {found['norms']}-norm\n"
        f"sites {SOURCES[found['source']]}\n")
    shown = found["source"] == "inferred"
    print_table(
        ("stack", "role", "sites", "module", "in", "out", "rows", "ports",
         *(["how it is known"] if shown else [])),
        ((site["stack"], site["role"], site["sites"], site["module"], site["d_in"] or "",
          site["d_out"] or "", site["rows"], ", ".join(site["ports"]),
          *([site["why"]] if shown else [])) for site in found["sites"]),
        right=("sites", "in", "out"),
    )


def _text(row: Family) -> str:
    """Return a row as YAML, what is as by default left out."""
    return to_text(row.model_dump(mode="json", exclude_defaults=True))


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be written ({error.strerror})") from error

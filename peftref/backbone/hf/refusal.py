"""The message for a model that no row describes and inference does not: what was found."""

from __future__ import annotations

import re
from dataclasses import replace

from transformers import PreTrainedModel

from peftref.backbone.family import Role, expand, families
from peftref.backbone.hf.modules import base_prefix, measure, named_modules
from peftref.backbone.infer import Finding, Findings, Section, StackFindings
from peftref.backbone.site_table import SiteKind
from peftref.errors import SitesError

__all__ = ["refusal"]

SHOWN = 40
BY_NAME = "suggested by its name alone"


def refusal(model: PreTrainedModel, found: Findings) -> SitesError:
    """Return the error for ``model``: what a trial showed, roles guessed by name, the rest."""
    ends: dict[str, set[str]] = {}
    wanted: dict[str, None] = {}
    for role in _known_roles():
        wanted.setdefault(role.name)
        for path in role.place.module:
            ends.setdefault(f".{path}", set()).add(role.name)
    named: dict[str, str] = {}
    other: dict[str, None] = {}
    for path, module in named_modules(model).items():
        if measure(module).kind is SiteKind.SPAN:
            continue
        shape = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        end = max((end for end in ends if f".{path}".endswith(end)), key=len, default="")
        if len(ends.get(end, ())) == 1:
            named.setdefault(next(iter(ends[end])), shape)
        else:
            other.setdefault(shape)
    missing = [role for role in wanted if role not in named]
    listed = "; ".join(f"{role} ({path})" for role, path in named.items()) or "none"
    message = (
        f"No site row describes model type {model.config.model_type!r} "
        f"({type(model).__name__}), and inference is not certain: {'; '.join(found.doubts)}.\n"
        f"Roles that its module names suggest: {listed}.\n"
        f"Roles not recognised: {', '.join(missing) or 'none'}.\n"
        f"Other modules: {', '.join(list(other)[:SHOWN]) or 'none'}.\n"
        f"Rows exist for: {', '.join(sorted(families()))}. Write a row for this type and give it "
        "with --sites (in Python: sites=), or select modules by path: site: "
        "{module: 'regular expression'}.")
    draft = found if found.stacks else _guess(model, found, named, list(other))
    return SitesError(message, model_type=model.config.model_type, draft=draft.text())


def _guess(
    model: PreTrainedModel, found: Findings, named: dict[str, str], other: list[str]
) -> Findings:
    """Return a draft from names alone: one stack, at the list that most of them are in."""
    prefix = base_prefix(model)
    lists = [path.partition(".*.")[0] for path in named.values() if ".*." in path]
    layers = max(set(lists), key=lists.count, default=f"{prefix}layers")
    sections: dict[Section, list[Finding]] = {"before": [], "layer": [], "after": []}
    for role, path in named.items():
        inside = path.startswith(f"{layers}.*.")
        section: Section = "layer" if inside else (
            "before" if role.startswith("embedding.") or role == "norm.embedding" else "after")
        shown = path.removeprefix(f"{layers}.*.") if inside else path.removeprefix(prefix)
        sections[section].append(Finding(role, shown, BY_NAME))
    stack = StackFindings(layers.removeprefix(prefix),
                          sections={name: tuple(each) for name, each in sections.items()})
    name = "encoder" if "encoder" in layers.split(".") else "decoder"
    return replace(found, stacks={name: stack}, unplaced=other)


def _known_roles() -> list[Role]:
    return [
        role
        for row in families().values()
        for stack in row.stacks.values()
        for part in (stack.before, stack.layer, stack.after)
        for role in expand(part)
        if "." in role.name
    ]

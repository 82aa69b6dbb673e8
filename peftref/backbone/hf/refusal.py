"""The message for a model type that no row describes: what could be told, and what could not."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from peftref.backbone.family import Role, expand, families
from peftref.backbone.hf.modules import measure, named_modules
from peftref.backbone.site_table import SiteKind
from peftref.errors import BackboneError

__all__ = ["refusal"]

SHOWN = 40


def refusal(model: PreTrainedModel) -> BackboneError:
    """Return the error for ``model``: roles guessed by the names of its modules, the rest."""
    ends: dict[str, set[str]] = {}
    wanted: dict[str, None] = {}
    for role in _known_roles():
        wanted.setdefault(role.name)
        for path in role.place.module:
            ends.setdefault(f".{path}", set()).add(role.name)
    found: dict[str, str] = {}
    other: dict[str, None] = {}
    for path, module in named_modules(model).items():
        if measure(module).kind is SiteKind.SPAN:
            continue
        shape = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        end = max((end for end in ends if f".{path}".endswith(end)), key=len, default="")
        if len(ends.get(end, ())) == 1:
            found.setdefault(next(iter(ends[end])), shape)
        else:
            other.setdefault(shape)
    missing = [role for role in wanted if role not in found]
    listed = "; ".join(f"{role} ({path})" for role, path in found.items()) or "none"
    return BackboneError(
        f"No site row describes model type {model.config.model_type!r} "
        f"({type(model).__name__}).\n"
        f"Roles that its module names suggest: {listed}.\n"
        f"Roles not recognised: {', '.join(missing) or 'none'}.\n"
        f"Other modules: {', '.join(list(other)[:SHOWN]) or 'none'}.\n"
        f"Rows exist for: {', '.join(sorted(families()))}. Write a row for this type and give it "
        "with --sites, or select modules by path: site: {module: 'regular expression'}."
    )


def _known_roles() -> list[Role]:
    return [
        role
        for row in families().values()
        for stack in row.stacks.values()
        for part in (stack.before, stack.layer, stack.after)
        for role in expand(part)
        if "." in role.name
    ]

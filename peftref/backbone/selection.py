"""From a selector to the sites it names, in execution order; nothing is left out in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peftref.backbone.pattern import expand_braces, role_matches
from peftref.backbone.site_table import Site, SiteTable
from peftref.errors import BackboneError, unknown_name
from peftref.spec.selector import SiteSelector

__all__ = ["select"]

SHOWN = 20  # module paths that a message lists


def select(table: SiteTable, selector: SiteSelector) -> tuple[Site, ...]:
    """Return the sites of ``table`` that ``selector`` names and that have its port.

    Every alternative of a role pattern must give at least one site unless a ``?`` in it says
    that a backbone may lack it; so the result is empty only if all of them are optional. A
    pattern with ``*``, and a raw ``module`` pattern, passes over sites without the port.

    Raises:
        BackboneError: a role, layer, stack, module or port that this backbone does not have.
    """
    if selector.module is not None:
        return _raw(table, selector, selector.module)
    chosen: set[int] = set()
    for text in expand_braces(selector.select or ""):
        found = _alternative(table, selector, text.replace("?", ""), optional="?" in text)
        chosen.update(id(site) for site in found)
    return tuple(site for site in table.sites if id(site) in chosen)


def _alternative(
    table: SiteTable, selector: SiteSelector, pattern: str, *, optional: bool
) -> list[Site]:
    named = [site for site in table.sites if role_matches(pattern, site.role)]
    if not named:
        if optional:
            return []
        raise BackboneError(_no_role(table, pattern))
    placed = [site for site in named if _in_stack(table, selector, site)]
    if not placed and not optional:
        stacks = sorted({site.stack for site in named})
        raise BackboneError(f"Role {pattern!r} is in stack {' and '.join(stacks)} of this "
                            f"{table.family} backbone, not in stack {selector.stack!r}")
    kept = _in_layers(table, selector, placed)
    if not kept and placed and not optional:
        raise BackboneError(f"Role {pattern!r} is outside the layers, so layers: "
                            f"{_show(selector.layers)} leaves none of it")
    able = [site for site in kept if selector.port in site.ports]
    if kept and not able and not optional:
        raise BackboneError(_no_port(selector.port.value, pattern, kept))
    return able


def _in_stack(table: SiteTable, selector: SiteSelector, site: Site) -> bool:
    """Whether a site is in the selected stack; towers side by side have no first and last."""
    if selector.stack in ("first", "last"):
        both = {"encoder", "decoder"} <= set(table.layers)
        named = "encoder" if selector.stack == "first" else "decoder"
        return not both or site.stack == named
    return selector.stack in (None, site.stack)


def _no_role(table: SiteTable, pattern: str) -> str:
    if not table.sites:
        return (f"No roles are known for this backbone, so {pattern!r} selects nothing; select "
                "modules by path: site: {module: 'regular expression'}")
    if pattern == "embedding.tokens":
        return (f"This {table.family} backbone reads no tokens and has no token embedding, so no "
                "prompt can be put before its input; prefixes act in its attention instead")
    if "*" in pattern:
        return (f"No role of this {table.family} backbone matches {pattern!r}. "
                f"Available: {', '.join(table.roles())}")
    return unknown_name(f"role of this {table.family} backbone", pattern, table.roles())


def _no_port(port: str, what: str, sites: Sequence[Site]) -> str:
    offered = sorted({each.value for site in sites for each in site.ports})
    return (f"{what!r} names {len(sites)} sites, such as {sites[0].label}, and none has port "
            f"{port!r}. Ports there: {', '.join(offered)}")


def _in_layers(table: SiteTable, selector: SiteSelector, sites: list[Site]) -> list[Site]:
    if selector.layers == "all":
        return sites
    stacks = dict.fromkeys(site.stack for site in sites if site.layer is not None)
    wanted = {(stack, layer) for stack in stacks
              for layer in _indices(selector.layers, table.layers[stack], stack)}
    return [site for site in sites if (site.stack, site.layer) in wanted]


def _indices(layers: str | tuple[int, ...], count: int, stack: str) -> Iterable[int]:
    """Return the layer indices that ``layers`` means in a stack of ``count``."""
    if isinstance(layers, str):
        bounds = [int(part) if part else None for part in layers.split(":")]
        chosen = range(count)[slice(*bounds)]
        outside = [bound for bound in bounds[:2] if bound is not None and abs(bound) > count]
    else:
        chosen = [layer % count for layer in layers if -count <= layer < count]
        outside = [layer for layer in layers if not -count <= layer < count]
    if outside or not chosen:
        found = f"layer {outside[0]} does not exist" if outside else "this is no layer"
        raise BackboneError(f"layers: {_show(layers)}: {found} in stack {stack!r}, which has "
                            f"{count} layers (0 to {count - 1}, or -{count} to -1); 'stack' "
                            "chooses one stack")
    return chosen


def _show(layers: str | tuple[int, ...]) -> str:
    return repr(layers if isinstance(layers, str) else list(layers))


def _raw(table: SiteTable, selector: SiteSelector, pattern: str) -> tuple[Site, ...]:
    named = [site for path, site in table.modules.items() if re.fullmatch(pattern, path)]
    if not named:
        raise BackboneError(
            f"module: {pattern!r} matches no whole module path of this backbone. Paths: "
            f"{', '.join(list(table.modules)[:SHOWN])}{', ...' * (len(table.modules) > SHOWN)}")
    placed = [site for site in named if _in_stack(table, selector, site)]
    kept = _in_layers(table, selector, placed)
    if not kept:
        raise BackboneError(
            f"module: {pattern!r} matches {len(named)} modules, such as {named[0].module!r}, but "
            f"none in stack {selector.stack or 'any'!r}, layers {_show(selector.layers)}")
    able = tuple(site for site in kept if selector.port in site.ports)
    if not able:
        raise BackboneError(_no_port(selector.port.value, pattern, kept))
    return able

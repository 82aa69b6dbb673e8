"""The plugins that a plan uses, as an artifact names them; never loaded by an artifact."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftref.errors import ArtifactError
from peftref.ir.plan import Plan
from peftref.registry import Origin, Registry, couplings, origin, primitives, procedures

__all__ = ["check_plugins", "plugins_of"]

_REGISTRIES: dict[str, Registry[Any]] = {
    "primitive": primitives, "coupling": couplings, "procedure": procedures}


def plugins_of(plan: Plan) -> list[dict[str, Any]]:
    """Return name, version and used entries of every plugin that a plan needs."""
    used: dict[Origin, list[str]] = {}
    for kind, name, entry in sorted(set(_entries(plan)), key=lambda found: found[:2]):
        source = origin(entry)
        if source is not None:
            used.setdefault(source, []).append(f"{kind} {name}")
    return [{"name": source.name, "version": source.version, "provides": provided}
            for source, provided in used.items()]


def _entries(plan: Plan) -> Iterator[tuple[str, str, type]]:
    for module in plan.modules:
        for edit in module.edits:
            programs = [edit.program, *([edit.gate] if edit.gate is not None else [])]
            for step in (step for program in programs for step in program.steps):
                yield "primitive", step.primitive.name, type(step.primitive)
    for coupling in plan.composition.couplings:
        yield "coupling", coupling.name, couplings.get(coupling.name)
    for procedure in plan.procedures:
        yield "procedure", procedure.name, procedures.get(procedure.name)


def check_plugins(path: str | Path, stated: Iterable[Any]) -> None:
    """Refuse an artifact whose plugins are not loaded; warn of another version.

    Raises:
        ArtifactError: an entry that the artifact needs is not registered, or by another plugin.
    """
    for plugin in stated:
        if not isinstance(plugin, Mapping):
            raise ArtifactError(f"{path}: 'plugins' is a list of names with versions")
        name, held = str(plugin.get("name")), str(plugin.get("version"))
        for provided in plugin.get("provides", ()):
            kind, _, entry = str(provided).partition(" ")
            registry = _REGISTRIES.get(kind)
            if registry is None or entry not in registry:
                raise ArtifactError(
                    f"{path}: needs plugin {name!r} (version {held}), which provides the {kind} "
                    f"{entry!r}; load it first (--plugin FILE, peftref.load_plugin, or install "
                    "it). An artifact never loads code by itself"
                )
            source = origin(registry.get(entry))
            if source is None or source.name != name:
                given = "peftref" if source is None else source.name
                raise ArtifactError(
                    f"{path}: the {kind} {entry!r} is that of plugin {name!r}, but here {given!r} "
                    "provides it"
                )
            if source.version != held:
                warnings.warn(
                    f"{path}: was made with version {held} of plugin {name!r}, this is "
                    f"{source.version}", stacklevel=3,
                )
                break

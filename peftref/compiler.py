"""The public verbs: load, compile, attach, restore."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peftref.adapted import Adapted
from peftref.artifact import Artifact, read
from peftref.backbone.family import Family, read_family
from peftref.backbone.hf import site_table, weight_hash
from peftref.backbone.site_table import SiteTable
from peftref.errors import ArtifactError, PeftRefError, SpecError
from peftref.ir.device import DEVICES, Device, device_named
from peftref.ir.graph import AdapterGraph
from peftref.ir.plan import Plan
from peftref.lowering.attach import attach_plan
from peftref.lowering.placed import device_of
from peftref.passes.base import Pipeline
from peftref.passes.make_plan import make_plan
from peftref.passes.pipelines import default_passes
from peftref.plugins import check_plugins
from peftref.registry import couplings, primitives, procedures
from peftref.spec import load
from peftref.spec.composition import CompositionSpec
from peftref.spec.loader import node_of, validated
from peftref.spec.technique import TechniqueSpec

__all__ = ["attach", "compile", "compile_table", "load", "restore"]

Source = str | Mapping[str, Any] | TechniqueSpec | CompositionSpec
Sites = str | Path | Family


Observer = Callable[[str, AdapterGraph], None]


class Registries:
    """The shipped and plugged-in entries, as the passes ask for them."""

    def primitive(self, name: str) -> type:
        return primitives.get(name)

    def coupling(self, name: str) -> Any:  # noqa: ANN401 - an entry of an open registry
        return couplings.get(name)

    def procedure(self, name: str) -> Any:  # noqa: ANN401 - an entry of an open registry
        return procedures.get(name)


def compile(  # noqa: A001
    spec: Source,
    model: PreTrainedModel,
    *,
    tokens: int = 1024,
    sites: Sites | None = None,
    device: str | None = None,
    dtype: str | None = None,
    observe: Observer | None = None,
) -> Plan:
    """Compile a technique or composition for a backbone, without touching it.

    Args:
        spec: name, expression, path, mapping or spec (see ``load``).
        model: the backbone; it may be on the meta device. What is attached to it already is
            not seen.
        tokens: tokens a step, for the choice of lowering.
        sites: the model's site row, or its file; None: the built-in row, else an inferred one.
        device: name of the device that the choice is made for (``cpu``, ``h100``, ``a100``);
            None: the one that the model is on.
        dtype: type of the weights in that step, such as ``bfloat16``; None: the model's own.
        observe: sees the name of each pass and the graph after it.

    Returns:
        The plan: edits, tensors, properties, costs.

    Raises:
        SpecError: the spec is wrong.
        CompositionError: it has no sound meaning.
        BackboneError: the backbone lacks what it needs.
        SitesError: the backbone's sites are not known, and not inferred with certainty.
    """
    composition = load(spec)
    strict = any(m.site.module is None for t in composition.members for m in t.technique.modules)
    row = read_family(sites) if isinstance(sites, str | Path) else sites
    table = site_table(model, row, strict=strict)
    where = device_of(model) if device is None else device_named(device)
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    return compile_table(
        composition, table, tokens=tokens, device=where, dtype=dtype, observe=observe
    )


def compile_table(
    composition: CompositionSpec,
    table: SiteTable,
    *,
    tokens: int = 1024,
    device: Device = DEVICES["cpu"],
    dtype: str = "float32",
    observe: Observer | None = None,
) -> Plan:
    """Compile for a site table; needs no model and no torch."""
    library = Registries()
    graph = AdapterGraph(composition, table)
    pipeline = Pipeline(default_passes(library, tokens, device, dtype), observe)
    pipeline.run(graph)
    return make_plan(graph, pipeline.records, library)


def attach(
    model: PreTrainedModel,
    plan: Plan | Source,
    *,
    name: str = "default",
    seed: int = 0,
    sites: Sites | None = None,
) -> Adapted:
    """Apply a plan to a model in place.

    The backbone is frozen; task heads stay trainable. Several adapters may be attached under
    different names; all are active until told otherwise.

    Args:
        model: a Hugging Face model of the family that the plan was made for.
        plan: a plan, or anything that ``load`` takes.
        name: name of the adapter.
        seed: of the initial values.
        sites: as for ``compile``; a plan has its sites already.

    Returns:
        The handle to train, merge, save and detach.

    Raises:
        BackboneError: the model cannot take it; nothing is changed then.
    """
    if not isinstance(plan, Plan):
        plan = compile(plan, model, sites=sites)
    elif sites is not None:
        raise SpecError("sites has no effect on a plan: give it to compile")
    adapted = Adapted(model, attach_plan(model, plan, name, seed), seed)
    try:
        adapted.setup_without_data()
    except PeftRefError:
        adapted.detach()
        raise
    return adapted


def _stored_row(artifact: Artifact) -> Family | None:
    stored = artifact.info.get("sites")
    if stored is None:
        return None
    try:
        return validated(Family, node_of(stored))
    except SpecError as error:
        raise ArtifactError(f"{artifact.path}: its site row is wrong: {error}") from error


def restore(
    model: PreTrainedModel,
    path: str | Path,
    *,
    name: str = "default",
    check_backbone: bool = True,
) -> Adapted:
    """Attach a saved adapter to its backbone.

    Args:
        model: the backbone that the adapter was trained on; a task head of the same shape gets
            the saved head.
        path: artifact folder.
        name: name of the adapter.
        check_backbone: refuse other weights. Pass False for the same backbone in another type.

    Raises:
        ArtifactError: the folder is damaged, or made for another backbone.
    """
    artifact = read(path)
    if artifact.composition is None:
        raise ArtifactError(
            f"{path}: holds a task head without an adapter; load it with peftref.from_pretrained"
        )
    known = artifact.info.get("backbone", {}).get("hash")
    if check_backbone and known is not None and known != (found := weight_hash(model)):
        raise ArtifactError(
            f"{path}: was trained on backbone {artifact.info['backbone'].get('name')!r} with "
            f"weights {known[:19]}, this model has {found[:19]}; load that backbone (in type "
            f"{artifact.info['backbone'].get('dtype')}); in Python, restore(..., "
            "check_backbone=False) skips this check"
        )
    check_plugins(path, artifact.info.get("plugins", ()))
    plan = compile(artifact.composition, model, sites=_stored_row(artifact))
    planned = {t.name for t in plan.tensors if t.spec.trainable or t.spec.buffer}
    odd = sorted(planned ^ set(artifact.tensors))
    if odd:
        raise ArtifactError(
            f"{path}: its tensors do not fit this model: {len(odd)} differ, first {odd[0]!r}"
        )
    for tensor in plan.tensors:
        stored = artifact.tensors.get(tensor.name)
        if stored is not None and tuple(stored.shape) != tensor.spec.shape:
            raise ArtifactError(
                f"{path}: tensor {tensor.name!r} has shape {tuple(stored.shape)}, this model needs "
                f"{tensor.spec.shape}"
            )
    seed = int(artifact.info.get("seed", 0))
    adapted = Adapted(model, attach_plan(model, plan, name, seed), seed)
    try:
        adapted.load_state_dict(artifact.tensors)
        adapted.load_head(artifact.head)
    except PeftRefError:
        adapted.detach()
        raise
    return adapted

"""A module's place in the PEFT-Ref typology, derived from its expression.

Sabry and Belz 2023, arXiv 2304.12410. Nothing here is declared for a technique: each value
follows from the site, the algebra of the primitives, the interaction and the couplings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from peftref.ir.primitive import IDENTITY, Algebra, Place
from peftref.registry import primitives
from peftref.spec.composition import CompositionSpec
from peftref.spec.selector import SiteSelector
from peftref.spec.technique import COMBINATORS, Expression, ModuleSpec
from peftref.spec.typology import InsertionForm, IntegrationKind, Port

__all__ = ["Row", "typology"]

# Divisible by every block size in use, so that each primitive can be asked without a backbone.
WIDTH = 23040
DYNAMIC = ("gate", "instance_attention", "mix")
SPARSE = ("prune",)


@dataclass(frozen=True, slots=True)
class Row:
    """The properties of one module; field names are the paper's."""

    module: str
    workspace: str
    intra_connectivity: str
    inter_connectivity: str
    parameters_adapted: str
    sharing: str
    input_type: str
    insertion: str
    integration: str


def typology(spec: CompositionSpec) -> Iterator[Row]:
    """Yield a row for every module of every member."""
    for member in spec.members:
        couplings = {c.name for c in spec.couplings if not c.members or member.name in c.members}
        for module in member.technique.modules:
            yield _row(f"{member.name}.{module.name}", module, couplings)


def _row(name: str, module: ModuleSpec, couplings: set[str]) -> Row:
    place = _place(module.site.port)
    algebra = _algebra(module.function, IDENTITY, place)
    integration = module.interaction.integration
    scale = "" if integration.scale is None else f" x {integration.scale:g}"
    shared = "share" in couplings or any(
        leaf.arguments.get("share") is not None for leaf in _leaves(module.function)
    )
    adapted = _adapted(algebra, module)
    return Row(
        module=name,
        workspace=_workspace(module.site),
        intra_connectivity=_inside(algebra, module.function),
        inter_connectivity=_outside(algebra, couplings, selected=adapted == "selection"),
        parameters_adapted=adapted,
        sharing="shared" if shared else "none",
        input_type=_input(algebra, module),
        insertion=module.interaction.insertion.value,
        integration=f"{integration.kind.value}{scale}",
    )


def _place(port: Port) -> Place:
    shape = {Port.WEIGHT: (WIDTH, WIDTH), Port.BIAS: (WIDTH,)}.get(port, ())
    return Place(WIDTH, WIDTH, WIDTH, shape, heads=12, layers=12)


def _algebra(function: Expression, stream: Algebra, place: Place) -> Algebra:
    """Return what holds for the function after ``stream``, as the compiler derives it."""
    if function.name == "chain":
        for child in function.children:
            stream = _algebra(child, stream, place)
        return stream
    kind = primitives.get(function.name)
    primitive = kind(kind.Arguments(**function.arguments), place)
    if function.children:
        branches = tuple(_algebra(child, stream, place) for child in function.children)
        return primitive.combine(branches)
    return primitive.combine(() if primitive.algebra().source else (stream,))


def _leaves(function: Expression) -> Iterator[Expression]:
    if function.name not in COMBINATORS:
        yield function
    for child in function.children:
        yield from _leaves(child)


def _workspace(site: SiteSelector) -> str:
    """Return the parts of the backbone that a pattern starts with."""
    if site.select is None:
        return f"modules {site.module}"
    if site.select.startswith("{"):
        heads = site.select[1:].split("}")[0].split(",")
    else:
        heads = re.split(r"\.(?![^{]*\})", site.select)[:1]
    names = [head.strip().split(".")[0].rstrip("?") for head in heads]
    return ", ".join(dict.fromkeys("any" if name == "*" else name for name in names))


def _inside(algebra: Algebra, function: Expression) -> str:
    if algebra.source:
        alone = sum(1 for _ in _leaves(function)) == 1
        return "free tensor" if alone else "free tensor + network"
    if algebra.mixes_tokens:
        return "dense: attention"
    if algebra.diagonal:
        return "none (vector)"
    return "dense: linear" if algebra.linear else "dense: non-linear"


def _outside(algebra: Algebra, couplings: set[str], *, selected: bool) -> str:
    if algebra.per_sample or couplings & set(DYNAMIC):
        return "dynamic"
    sparse = algebra.diagonal or selected or couplings & set(SPARSE)
    return "fixed: sparse" if sparse else "fixed: dense"


def _adapted(algebra: Algebra, module: ModuleSpec) -> str:
    interaction, port = module.interaction, module.site.port
    if port in (Port.WEIGHT, Port.BIAS):
        return "selection" if algebra.source else "reparameterisation"
    adds = interaction.integration.kind in (IntegrationKind.ADD, IntegrationKind.SCALED_ADD)
    beside = interaction.insertion is InsertionForm.PARALLEL and module.read in (None, Port.INPUT)
    # A linear map beside a linear module is an addition to its weight.
    projection = "." in (module.site.select or "")
    if algebra.linear and algebra.matrix and adds and beside and projection:
        return "reparameterisation"
    rotates = interaction.integration.kind is IntegrationKind.ROTATE
    return "reparameterisation" if rotates else "addition"


def _input(algebra: Algebra, module: ModuleSpec) -> str:
    if algebra.source or module.site.port in (Port.WEIGHT, Port.BIAS):
        return "weights"
    if module.read is not None:
        return "data" if module.read is Port.INPUT else "hidden"
    return "hidden" if module.interaction.insertion is InsertionForm.SEQUENTIAL else "data"

"""From the final graph to plan data."""

from __future__ import annotations

from peftref.backbone.site_table import SiteKind
from peftref.errors import CompositionError
from peftref.ir.edits import EditPlan, ModulePlan, Program, Step
from peftref.ir.graph import AdapterGraph
from peftref.ir.plan import Plan, PlannedTensor, Properties
from peftref.ir.types import OperationNode, ReadNode, Stage, TensorNode
from peftref.passes.base import Library, PassRecord, make_procedure
from peftref.passes.check_rules import overlap
from peftref.spec.typology import IntegrationKind

__all__ = ["is_low_rank", "make_plan"]


def make_plan(graph: AdapterGraph, records: list[PassRecord], library: Library) -> Plan:
    """Return the plan of a graph that went through all passes."""
    modules: dict[str, list[EditPlan]] = {}
    tensors: dict[str, PlannedTensor] = {}
    owners: dict[str, int] = {}
    for address, write in graph.writes():
        gate = graph.gate(address)
        edit = EditPlan(
            write,
            _program(graph, graph.value(address)),
            None if gate is None else _program(graph, gate),
        )
        modules.setdefault(write.path, []).append(edit)
        for source, node in graph.tensors_of(address):
            if owners.setdefault(node.key, source) != source:
                raise CompositionError(
                    f"{write.label}: two tensors are named {node.key!r}; one coupling of a kind "
                    "(gate, prune) for each member"
                )
            owner = "" if node.spec.share is not None else write.path
            tensors[node.key] = PlannedTensor(node.key, node.spec, node.member, owner)
    planned = tuple(_order(path, edits) for path, edits in modules.items())
    return Plan(
        composition=graph.composition,
        table=graph.table,
        modules=planned,
        tensors=tuple(tensors.values()),
        procedures=tuple(graph.procedures),
        properties=_properties(graph, planned, library),
        servable=_servable(planned),
        records=tuple(records),
        graph=graph,
    )


def _program(graph: AdapterGraph, value: int) -> Program:
    order = graph.ancestors(value)
    register = {a: 0 for a in order if isinstance(graph.node(a), ReadNode)}
    names: list[str] = []
    for a in order:
        node = graph.node(a)
        if isinstance(node, TensorNode):
            names.append(node.key)
            register[a] = len(names)
    steps: list[Step] = []
    for a in order:
        node = graph.node(a)
        if isinstance(node, OperationNode):
            steps.append(Step(node.primitive, tuple(register[i] for i in graph.inputs(a))))
            register[a] = len(names) + len(steps)
    return Program(tuple(names), tuple(steps), register[value])


def _order(path: str, edits: list[EditPlan]) -> ModulePlan:
    """Sort by the fold; ``after`` moves an edit behind the ones it names."""
    # A span that is written through a linear comes after all that the linear itself does.
    ranked = sorted(edits, key=lambda e: (e.write.ends_a_span, e.stage, e.write.order))
    ranked = _respect_after(ranked)
    notes: list[str] = []
    for index, first in enumerate(ranked):
        for second in ranked[index + 1 :]:
            same = (first.write.ends_a_span, first.stage) == (
                second.write.ends_a_span,
                second.stage,
            )
            rows = overlap(first.write.site.rows, second.write.site.rows)
            if same and rows and not _commute(first, second):
                notes.append(
                    f"{path}: {first.write.member}.{first.write.module} before "
                    f"{second.write.member}.{second.write.module} (they do not commute)"
                )
    return ModulePlan(path, tuple(ranked), tuple(notes))


def _respect_after(edits: list[EditPlan]) -> list[EditPlan]:
    done: list[EditPlan] = []
    waiting = list(edits)
    names = {f"{e.write.member}.{e.write.module}" for e in edits}
    while waiting:
        placed = {f"{e.write.member}.{e.write.module}" for e in done}
        ready = [e for e in waiting if all(a in placed or a not in names for a in e.write.after)]
        if not ready:
            labels = ", ".join(e.write.label for e in waiting)
            raise CompositionError(f"'after' goes in a circle: {labels}")
        if ready[0].stage < max((e.stage for e in done), default=Stage.TOKENS) and (
            ready[0].write.ends_a_span == done[-1].write.ends_a_span
        ):
            raise CompositionError(
                f"{ready[0].write.label}: 'after' asks for an order against the fold "
                "(add, rotate, normalise, then activation edits)"
            )
        done.append(ready[0])
        waiting.remove(ready[0])
    return done


def _commute(first: EditPlan, second: EditPlan) -> bool:
    if first.stage in (Stage.WEIGHT_ADD, Stage.BIAS, Stage.PARALLEL, Stage.STREAMS):
        return True
    algebras = (first.write.algebra, second.write.algebra)
    if first.stage is Stage.KEYS_VALUES:
        return True  # attention does not depend on the order of keys
    return all(a is not None and a.diagonal for a in algebras)


def _properties(
    graph: AdapterGraph, modules: tuple[ModulePlan, ...], library: Library
) -> Properties:
    edits = [edit for module in modules for edit in module.edits if not edit.write.aside]
    blockers = tuple(reason for module in modules for reason in module.blockers)
    algebras = [edit.write.algebra for edit in edits if edit.write.algebra is not None]
    return Properties(
        identity_at_init=all(_is_identity(edit) for edit in edits),
        mergeable=not blockers,
        blockers=blockers,
        mixes_tokens=any(a.mixes_tokens for a in algebras),
        needs_token_mask=any(a.per_sample for a in algebras),
        needs_data=any(make_procedure(p, library).needs_data for p in graph.procedures),
        order_notes=tuple(note for module in modules for note in module.notes),
    )


def _is_identity(edit: EditPlan) -> bool:
    algebra = edit.write.algebra
    if algebra is None or edit.write.kind is IntegrationKind.CONCAT or (
        edit.stage is Stage.STREAMS
    ):
        return False
    beside = edit.stage is Stage.PARALLEL or edit.write.read is not edit.write.port
    if edit.write.kind is IntegrationKind.RESCALE and beside:
        return False  # y * f(x) keeps y where f is one, which no algebra states
    if edit.write.kind.value in ("rescale", "rotate", "replace"):
        return algebra.identity_at_init
    return algebra.zero_at_init


def _servable(modules: tuple[ModulePlan, ...]) -> dict[str, tuple[str, ...]]:
    blockers = tuple(reason for module in modules for reason in module.blockers)
    lora = tuple(
        f"{edit.write.label}: is no low-rank addition to the weight of a linear module"
        for module in modules
        for edit in module.edits
        if not is_low_rank(edit) or edit.write.aside or edit.write.site.kind is SiteKind.MATRIX
    )
    return {"merged": blockers, "peft": lora, "vllm": lora, "peftref": ()}


def is_low_rank(edit: EditPlan) -> bool:
    """Whether an edit is ``W + s B A``: a chain with one matrix each at two of its links."""
    program = edit.program
    first = len(program.tensors) + 1  # register of the first step's result
    links = [(i, s) for i, s in enumerate(program.steps) if not s.primitive.on_tensors]
    streams = {0, *(first + i for i, _ in links)}
    before = 0
    for index, step in links:
        if [i for i in step.inputs if i in streams] != [before]:
            return False
        before = first + index
    factors = [s.primitive for _, s in links if s.primitive.tensors()]
    bare = [s.primitive.link for _, s in links if not s.primitive.tensors()]
    if any(link is None or link.kind != "dropout" for link in bare):
        return False  # such as a sum over groups of inputs
    plain = all(len(f.tensors()) == 1 and f.tensors()[0].name.endswith(".weight") for f in factors)
    matrices = len(factors) == 2 and plain and all(len(f.tensors()[0].shape) == 2 for f in factors)
    return edit.stage is Stage.WEIGHT_ADD and matrices and before == program.result

"""What `show` knows of a specification and of a plan, as plain data for printing and for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from peftref.cli.typology import typology
from peftref.ir.edits import EditPlan
from peftref.ir.plan import Plan
from peftref.spec import parameters
from peftref.spec.composition import CompositionSpec
from peftref.spec.technique import Expression

__all__ = ["describe_plan", "describe_spec", "function_text"]

Plain = dict[str, Any]


def describe_spec(source: str, spec: CompositionSpec) -> Plain:
    """Return what holds on any backbone."""
    return {
        "name": spec.composition,
        "reference": spec.reference.model_dump() if spec.reference else None,
        "typology": [asdict(row) for row in typology(spec)],
        "modules": [
            {
                "module": f"{member.name}.{module.name}",
                "site": module.site.select or f"modules {module.site.module}",
                "port": module.site.port.value,
                "layers": module.site.layers,
                "function": function_text(module.function),
            }
            for member in spec.members
            for module in member.technique.modules
        ],
        "parameters": {
            name: parameter.model_dump(mode="json", exclude_defaults=True)
            for name, parameter in parameters(source).items()
        },
        "couplings": [item.model_dump(mode="json") for item in spec.couplings],
        "procedures": [
            item.model_dump(mode="json")
            for item in (
                *(p for member in spec.members for p in member.technique.procedures),
                *spec.procedures,
            )
        ],
        "learning_rates": {
            member.name: member.technique.learning_rate.model_dump()
            for member in spec.members
            if member.technique.learning_rate is not None
        },
    }


def function_text(function: Expression) -> str:
    """Return an expression on one line: links of a chain joined by ``>``."""
    if function.name == "chain":
        return " > ".join(function_text(child) for child in function.children)
    if function.children:
        return f"{function.name}({', '.join(map(function_text, function.children))})"
    pairs = ", ".join(f"{key}={value}" for key, value in function.arguments.items())
    return f"{function.name}({pairs})" if pairs else function.name


def describe_plan(plan: Plan, tokens: int) -> Plain:
    """Return what a plan does to its backbone; sites that are adapted alike are one entry."""
    cost, properties = plan.cost(tokens), plan.properties
    return {
        "family": plan.table.family,
        "layers": plan.table.layers,
        "hidden_size": plan.table.hidden_size,
        "backbone_parameters": plan.table.frozen_parameters,
        "trainable_parameters": plan.trainable_parameters,
        "trainable_share": plan.trainable_share,
        "stored_parameters": plan.stored_parameters,
        "edits": list(_edits(plan)),
        "cost": {name: getattr(cost, name) for name in cost.__slots__},
        "properties": asdict(properties),
        "servable": {target: list(blockers) for target, blockers in plan.servable.items()},
        "passes": [asdict(record) for record in plan.records],
    }


def _edits(plan: Plan) -> Iterator[Plain]:
    specs = {tensor.name: tensor for tensor in plan.tensors}
    groups: dict[tuple[object, ...], list[EditPlan]] = {}
    for module in plan.modules:
        for edit in module.edits:
            write = edit.write
            shapes = tuple(specs[name].spec.shape for name in edit.tensors)
            key = (write.member, write.module, write.site.stack, write.site.role, write.port)
            how = (edit.stage, write.form, write.op, write.why, bool(write.group))
            groups.setdefault((*key, *how, shapes), []).append(edit)
    for edits in groups.values():
        write, own = edits[0].write, [specs[name] for name in edits[0].tensors]
        names = {name for edit in edits for name in edit.tensors}
        yield {
            "module": f"{write.member}.{write.module}",
            "site": f"{write.site.stack}.{write.site.role}.{write.port.value}",
            "sites": len(edits),
            "layers": sorted({e.write.site.layer for e in edits if e.write.site.layer is not None}),
            "widths": [write.site.d_in, write.site.d_out],
            "stage": edits[0].stage.name.lower(),
            "form": write.form.name.lower() if write.form is not None else None,
            "op": write.op or None,
            "grouped": bool(write.group),
            "why": write.why or None,
            "mergeable": all(edit.mergeable for edit in edits),
            "tensors": {
                tensor.spec.name: {
                    "shape": list(tensor.spec.shape),
                    "trainable": tensor.spec.trainable,
                    "shared": tensor.owner == "",
                }
                for tensor in own
            },
            "per_site": sum(t.spec.size for t in own if t.spec.trainable and t.owner),
            "total": sum(specs[name].spec.size for name in names if specs[name].spec.trainable),
        }

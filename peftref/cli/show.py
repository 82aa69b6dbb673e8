"""``peftref show``: what a technique is, and what it does to a backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peftref.cli.check import TaskName
from peftref.cli.describe import describe_plan, describe_spec
from peftref.cli.forecast import forecast, print_forecast
from peftref.cli.sites import check_options, show_sites
from peftref.cli.style import count, memory, note, print_json, print_table, print_text
from peftref.errors import SpecError, unknown_name
from peftref.ir.graph import AdapterGraph
from peftref.ir.memory import Step
from peftref.ir.plan import Plan
from peftref.ir.printer import first_sites, print_graph
from peftref.spec import load, to_yaml

__all__ = ["command"]


def command(
    specification: Annotated[
        str | None,
        typer.Argument(
            metavar="[EXPR]",
            help="Name, expression or file of a technique; without it, the backbone's sites.",
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="PATH", help="Model: a folder, a hub name, minilm.")
    ] = None,
    sites: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Site row of the backbone, corrected.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the backbone's site row there.")
    ] = None,
    task: Annotated[TaskName, typer.Option(help="Head of the backbone.")] = "features",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a step, for costs; 1024, or --batch x length.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows a step: predict its memory and FLOPs.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row, with --batch.")] = 512,
    time: Annotated[bool, typer.Option("--time", help="Time three steps here.")] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of an epoch, with --time.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set whose training rows make the epoch.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Machine of the step: cpu, h100, a100.")
    ] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the weights; by default as the backbone is stored."),
    ] = None,
    graph: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the graph: .svg, .dot or .mmd.")
    ] = None,
    passes: Annotated[bool, typer.Option("--passes", help="Tell what each pass did.")] = False,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Print the graph after this pass.")
    ] = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print it resolved, as YAML.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Show what a technique is and what it does to a backbone.

    The backbone's weights are not read, so this takes seconds for a model of any size.
    """
    drawn = graph is not None or passes or after is not None or batch is not None
    tokens = _tokens(tokens, batch, length, asked=time or rows is not None or data is not None)
    check_options(specification, backbone, compiled=drawn, yaml=yaml, sites=sites is not None,
                  save=save is not None)
    if specification is None:
        show_sites(str(backbone), task, sites, save, json=json)
        return
    spec = load(specification)
    if yaml:
        print_text(to_yaml(spec).rstrip())
        return
    described, plan, texts = describe_spec(specification, spec), None, dict[str, str]()
    if backbone is not None:
        from peftref.backbone.hf import meta_model
        from peftref.compiler import compile as compile_plan

        def observe(name: str, graph: AdapterGraph) -> None:
            if name == after:
                texts[name] = print_graph(graph, first_sites(graph))

        model = meta_model(backbone, task)
        plan = compile_plan(
            spec, model, tokens=tokens, sites=sites, device=device, dtype=dtype, observe=observe
        )
        if after is not None and after not in texts:
            raise SpecError(unknown_name("pass", after, [each.name for each in plan.records]))
        described["plan"] = describe_plan(plan, tokens)
        if batch is not None:
            step = Step(batch, length, dtype or str(model.dtype).removeprefix("torch."), device)
            described["forecast"] = forecast(
                model, plan, task, step, rows=_rows_of(data) if data else rows, timed=time
            )
    if json:
        print_json(described)
    elif after is not None:
        print_text(texts[after])
    else:
        _print_all(described, backbone or "", passes=passes)
    if plan is not None and graph is not None:
        _draw(plan, graph)


def _print_all(described: dict[str, Any], backbone: str, *, passes: bool) -> None:
    _print_spec(described)
    if "plan" in described:
        _print_plan(backbone, described["plan"], passes=passes)
        print_forecast(described.get("forecast"))


def _tokens(tokens: int | None, batch: int | None, length: int, *, asked: bool) -> int:
    if batch is None and asked:
        raise SpecError("--time, --rows and --data tell of a step: give --batch too")
    return tokens or (batch * length if batch is not None else 1024)


def _rows_of(data: str) -> int:
    """Return the number of training rows of a data set."""
    from peftref.training.data import load_data
    from peftref.training.settings import DataSettings

    return len(load_data(DataSettings(source=data), "auto").split("train"))


def _draw(plan: Plan, path: Path) -> None:
    from peftref.cli.drawing import draw

    if plan.graph is None:
        raise SpecError("the plan has no graph to draw")
    draw(plan.graph, path)
    note(f"wrote {path}")


def _print_spec(found: Mapping[str, Any]) -> None:
    reference = found["reference"]
    source = f", {reference['paper']}, {reference['url']}" if reference else ""
    print_text(f"{found['name']}{source}\n")
    rows: Sequence[Mapping[str, str]] = found["typology"]
    heads = [name for name in rows[0] if name != "module"]
    # Properties go down and modules across, as in the paper's table.
    print_table(
        ("property", *(row["module"] for row in rows)),
        ([head.replace("_", " "), *(row[head] for row in rows)] for head in heads),
    )
    print_text()
    for module in found["modules"]:
        port = "" if module["port"] == "output" else f".{module['port']}"
        print_text(f"{module['module']} at {module['site']}{port}: {module['function']}")
    for kind in ("couplings", "procedures"):
        for item in found[kind]:
            members = f" of {', '.join(item['members'])}" if item.get("members") else ""
            values = ", ".join(f"{key}={value}" for key, value in item["arguments"].items())
            print_text(f"{kind[:-1]} {item['name']}{members}" + (f": {values}" if values else ""))
    for name, rate in found["learning_rates"].items():
        print_text(f"learning rate of {name}: {rate['default']:g} ({rate['source']})")
    if found["parameters"]:
        print_text()
        print_table(("parameter", "value", "values", "in PEFT", "about"), _parameters(found))


def _parameters(found: Mapping[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, parameter in found["parameters"].items():
        allowed = parameter["type"]
        if "range" in parameter:
            low, high = parameter["range"]
            allowed = f"{low:g} to {high:g}"
        elif "choices" in parameter:
            allowed = ", ".join(map(str, parameter["choices"]))
        about = parameter.get("doc", "")
        rows.append([name, parameter["default"], allowed, parameter.get("peft", ""), about])
    return rows


def _print_plan(backbone: str, plan: Mapping[str, Any], *, passes: bool) -> None:
    layers = ", ".join(f"{number} {stack} layers" for stack, number in plan["layers"].items())
    print_text(
        f"\non {backbone}: {plan['family']}, {layers}, width {plan['hidden_size']}, "
        f"{count(plan['backbone_parameters'])} parameters\n"
    )
    print_table(
        ("module", "site", "sites", "tensors", "a site", "all", "stage"),
        (
            (
                edit["module"], edit["site"], edit["sites"], _tensors(edit["tensors"]),
                f"{edit['per_site']:,}", f"{edit['total']:,}",
                edit["stage"] if edit["form"] is None else f"{edit['stage']}, {edit['form']}",
            )
            for edit in plan["edits"]
        ),
        right=("sites", "a site", "all"),
    )  # fmt: skip
    _print_forms(plan["edits"])
    cost, added = plan["cost"], plan["cost"]["forward_flops"]
    share = added / max(cost["backbone_forward_flops"], 1)
    print_text(
        f"\ntrainable   {plan['trainable_parameters']:,} parameters, "
        f"{plan['trainable_share']:.3%} of the backbone; the task head is not counted\n"
        f"compute     {count(added)} FLOPs more in a forward pass of {cost['tokens']:,} tokens, "
        f"{share:.2%} of the backbone's linear modules\n"
        f"memory      {memory(cost['parameter_bytes'])} of parameters, "
        f"{memory(cost['optimiser_bytes'])} of gradients and Adam moments, "
        f"{memory(cost['activation_bytes'])} of activations (float32, no dropout)"
    )
    _print_properties(plan)
    if passes:
        print_text()
        print_table(
            ("pass", "nodes", "what it did"),
            ((record["name"], record["nodes"], record["summary"]) for record in plan["passes"]),
            right=("nodes",),
        )


def _print_forms(edits: Sequence[Mapping[str, Any]]) -> None:
    """Which form each write uses, by which op, and why."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for edit in edits:
        if edit["op"] or edit["why"]:
            op = f"{edit['op'] or ''}{', grouped' if edit['grouped'] else ''}"
            how = (edit["form"] or "", op, edit["why"] or "")
            alike.setdefault((edit["module"], *how), []).append(edit["site"])
    if alike:
        print_text()
        rows = [(module, ", ".join(sites), *how) for (module, *how), sites in alike.items()]
        print_table(("module", "sites", "form", "op", "why"), rows)


def _tensors(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    parts: list[str] = []
    for name, tensor in tensors.items():
        shape = "x".join(map(str, tensor["shape"])) or "1"
        marks = ["shared"] * tensor["shared"] + ["frozen"] * (not tensor["trainable"])
        parts.append(f"{name} {shape}" + (f" ({', '.join(marks)})" if marks else ""))
    return ", ".join(parts)


def _print_properties(plan: Mapping[str, Any]) -> None:
    properties = plan["properties"]
    same = "equals the backbone's" if properties["identity_at_init"] else "differs from it"
    print_text(f"at init     the output {same}")
    print_text(f"mergeable   {'yes' if properties['mergeable'] else 'no'}")
    for reason, sites in _reasons(properties["blockers"]).items():
        print_text(f"            {reason}" + (f" ({sites} sites)" if sites > 1 else ""))
    for target, blockers in plan["servable"].items():
        reasons = "; ".join(_reasons(blockers)) or "yes"
        print_text(f"serve as    {target}: {reasons if not blockers else f'no, {reasons}'}")
    for text in properties["order_notes"]:
        print_text(f"order       {text}")
    for name, text in (
        ("mixes_tokens", "a row depends on other rows: no cached decoding"),
        ("needs_token_mask", "the padding mask is read"),
        ("needs_data", "data are seen before the first step"),
    ):
        if properties[name]:
            print_text(f"needs       {text}")


def _reasons(blockers: Sequence[str]) -> Counter[str]:
    """Count blockers that differ in their site only."""
    return Counter(
        f"{place.split(' @ ')[0]}: {reason}" if reason else place
        for place, _, reason in (text.partition(": ") for text in blockers)
    )

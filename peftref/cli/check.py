"""``peftref check``: are these specifications right, and do they fit a backbone?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel

from peftref.cli.style import note, print_json, print_text
from peftref.errors import Mark, PeftRefError, SitesError, SpecError
from peftref.registry import Registry, couplings, primitives, procedures
from peftref.spec import load
from peftref.spec.composition import CompositionSpec
from peftref.spec.loader import Node, node_of, read_yaml, validated
from peftref.spec.technique import COMBINATORS, Expression
from peftref.spec.template import Template

__all__ = ["TaskName", "check_words", "command"]

TaskName = Literal["features", "classification", "regression", "causal_lm", "seq2seq_lm"]


def command(
    specifications: Annotated[
        list[str],
        typer.Argument(metavar="EXPR...", help="Names, expressions, files."),
    ],
    backbone: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Model: a folder, a hub name, minilm."),
    ] = None,
    sites: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Site row of the backbone, corrected.")
    ] = None,
    task: Annotated[TaskName, typer.Option(help="Head of the backbone.")] = "features",
    json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Check specifications; with a backbone, compile them for it.

    All are checked, also after the first that is wrong. Exit code 2 if any is.
    """
    if backbone is None and sites is not None:
        raise SpecError("--sites describes a backbone: give --backbone PATH too")
    compiled = _compiler(backbone, task, sites) if backbone is not None else None
    results: list[dict[str, object]] = []
    for source in specifications:
        try:
            spec, found = _found(source)
            if compiled is not None and spec is not None:
                found += f"; {compiled(spec)}"
        except SitesError:
            raise  # nothing can be right for a backbone whose sites are not known
        except PeftRefError as error:
            results.append({"source": source, "valid": False, "message": str(error)})
        else:
            results.append({"source": source, "valid": True, "message": found})
    _print(results, json=json)
    if not all(result["valid"] for result in results):
        raise typer.Exit(2)


def _compiler(
    backbone: str, task: TaskName, sites: Path | None
) -> Callable[[CompositionSpec], str]:
    """Return a function that compiles for the backbone and says how much is trained."""
    from peftref.backbone.hf import meta_model
    from peftref.compiler import compile as compile_plan

    model = meta_model(backbone, task)

    def compiled(spec: CompositionSpec) -> str:
        plan = compile_plan(spec, model, sites=sites)
        return f"{plan.trainable_parameters:,} trainable parameters"

    return compiled


def _print(results: Sequence[dict[str, object]], *, json: bool) -> None:
    if json:
        print_json(results)
        return
    for result in results:
        if result["valid"]:
            print_text(f"ok  {result['source']}: {result['message']}")
        else:
            note(f"error: {result['message']}")


def _found(source: str) -> tuple[CompositionSpec | None, str]:
    """Return the spec of a name, expression or file, and what it holds; a macro has no spec.

    Raises:
        PeftRefError: it is wrong.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        document = read_yaml(path)
        if "macro" in document.value:
            template = Template.read(document)
            template.function(node_of({}))
            return None, f"macro {template.name}, {_number(len(template.parameters), 'parameter')}"
    spec = load(source)
    check_words(spec)
    modules = sum(len(member.technique.modules) for member in spec.members)
    parts = [
        _number(len(spec.members), "technique"),
        _number(modules, "module"),
        *([_number(len(spec.couplings), "coupling")] if spec.couplings else []),
    ]
    names = ", ".join(member.name for member in spec.members)
    return spec, f"{', '.join(parts)} ({names})"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check_words(spec: CompositionSpec) -> None:
    """Check that every primitive, coupling and procedure exists and takes its arguments.

    Raises:
        SpecError: at the first that does not.
    """
    everyone = [item for member in spec.members for item in member.technique.procedures]
    for coupling in spec.couplings:
        _check_arguments(couplings, coupling.name, coupling.arguments, coupling.mark)
    for procedure in (*everyone, *spec.procedures):
        _check_arguments(procedures, procedure.name, procedure.arguments, procedure.mark)
    for member in spec.members:
        for module in member.technique.modules:
            for leaf in _leaves(module.function):
                _check_arguments(primitives, leaf.name, leaf.arguments, leaf.mark)


def _leaves(function: Expression) -> Iterator[Expression]:
    if function.name not in COMBINATORS:
        yield function
    for child in function.children:
        yield from _leaves(child)


def _check_arguments(
    registry: Registry[Any], name: str, arguments: Mapping[str, object], mark: Mark | None
) -> None:
    try:
        entry = registry.get(name)
    except SpecError as error:
        raise SpecError(str(error), mark=mark) from None
    model = getattr(entry, "Arguments", None)
    if isinstance(model, type) and issubclass(model, BaseModel):
        validated(model, Node(node_of(arguments, mark).value, mark, dict.fromkeys(arguments, mark)))

"""``peftref train``: train one composition."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftref.cli.style import note, print_json, print_text
from peftref.errors import SpecError

if TYPE_CHECKING:
    from peftref.training.run import Progress as Scored
    from peftref.training.session import FitResult
    from peftref.training.settings import RunSettings

__all__ = ["command"]


def command(
    composition: Annotated[
        str | None,
        typer.Argument(
            metavar="[COMPOSITION|RUN_FILE]",
            help="Technique, composition, expression or run file; 'none' trains the head alone.",
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="FILE", help="Run file; flags override it.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Folder or hub name of the backbone; 'minilm'.")
    ] = None,
    sites: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Site row of the backbone, corrected.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="File, folder, 'trec6', 'digits', or a data set's hub name.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the artifact.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random.")] = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Leave out rows in which something is missing.")
    ] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Set a field of the run file."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that is there, at the end.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a composition on a data set and save it as an artifact."""
    from peftref.training.settings import load_settings

    if composition is not None and is_run_file(composition):
        if run is not None:
            raise SpecError(f"two run files are given: {composition} and {run}; give one")
        run, composition = Path(composition), None
    flags: dict[str, object] = {
        "composition": composition, "backbone": backbone, "data": data, "output": output,
        "steps": steps, "seed": seed, "sites": None if sites is None else str(sites),
        "data.drop_missing": drop_missing or None,
    }
    if run is None:
        given = {name for name, value in flags.items() if value is not None}
        given |= {text.split("=")[0].split(".")[0].strip() for text in assignments or []}
        absent = [f"--{name}" for name in ("backbone", "data") if name not in given]
        if absent:
            raise SpecError(
                f"give {' and '.join(absent)}, or a run file: peftref init run writes one"
            )
    settings = load_settings(run, flags, assignments or [])
    result = _fit(settings, _place(settings, resume=resume, overwrite=overwrite), resume=resume)
    (_print_json if json else _print)(result)


def is_run_file(text: str) -> bool:
    """Whether ``text`` is the path of a YAML file that is no technique, composition or macro.

    Raises:
        SpecError: the file is missing or is not YAML.
    """
    if not text.endswith((".yaml", ".yml")) or text.startswith(("'", '"')):
        return False
    from peftref.spec.loader import read_yaml

    names = read_yaml(Path(text).expanduser()).value
    return not {"technique", "members", "macro"} & set(names)


def _place(settings: RunSettings, *, resume: bool, overwrite: bool) -> Path:
    """Return where the artifact goes, refusing what would be lost or is missing."""
    from peftref.training.publish import check_free, check_no_checkpoints

    if settings.output is None:
        raise SpecError("where shall the artifact go? Give --output FOLDER, or 'output' in the run")
    if settings.composition is None:
        raise SpecError(
            "what shall be trained? Give a composition, such as lora; none trains the head alone"
        )
    place = Path(settings.output)
    check_free(place, overwrite=overwrite)
    if not resume:
        check_no_checkpoints(place, overwrite=overwrite)
    return place


def _print_json(result: FitResult) -> None:
    print_json({
        "artifact": str(result.artifact), "metrics": dict(result.metrics),
        "trainable_parameters": result.trainable_parameters, "steps": result.steps,
        "seconds": round(result.seconds, 2),
    })


def _print(result: FitResult) -> None:
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    print_text(f"Validation after {result.steps} steps: {scores}")
    print_text(
        f"{result.trainable_parameters:,} trainable parameters without the head; "
        f"{result.seconds:.0f} s"
    )
    print_text(f"Artifact: {result.artifact}")


def _fit(settings: RunSettings, place: Path, *, resume: bool) -> FitResult:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from peftref.training.session import TrainingSession

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[scores]}"),
    )
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("training", total=None, scores="", visible=False)

        def on_step(step: int, total: int) -> None:
            bar.update(task, completed=step, total=total, visible=True)

        def on_evaluate(scored: Scored) -> bool:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scored.metrics.items())
            bar.update(task, scores=f"loss {scored.loss:.4f}")
            note(f"step {scored.step} of {scored.total}: {shown}")
            return False

        session = TrainingSession(settings, on_step=on_step)
        session.encoded("train")
        for line in session.notes:
            note(line)
        return session.fit(
            settings.composition, output=place, resume=resume, on_evaluate=on_evaluate
        )

"""``peftref search``: find compositions of high score and few parameters."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftref.cli.progress import Screen
from peftref.cli.style import memory, note, print_json, print_table, print_text
from peftref.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable

    from peftref.search.purchase import Purchase
    from peftref.search.settings import SearchRun

__all__ = ["command", "print_result"]


def command(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Run file with a search section.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="FILE", help="The same, as an option.")
    ] = None,
    space: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with the techniques to search over.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Folder or hub name of the backbone; 'minilm'.")
    ] = None,
    sites: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Site row of the backbone, corrected.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data set: file, folder or name.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Candidates to train.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall time of everything: 90s, 8m, 1h30m.")
    ] = None,
    max_params: Annotated[
        str | None, typer.Option(help="Most trainable parameters: a count, or 1% of the backbone.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Most memory of a training step, as predicted: 24GiB.")
    ] = None,
    require: Annotated[
        str | None, typer.Option(help="Servable so: merged, peft, vllm; several with commas.")
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(help="Of the front: quality,parameters,step_time,memory,latency."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what the budget buys.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Trainings at once.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of proposals and trainings.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; resumed if it exists.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Set a field of the run file."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Search for compositions of high score and few trainable parameters.

    Without arguments it searches the embedded example. The same command resumes an interrupted
    search: at most the trainings that were running are lost.
    """
    if file is not None and run is not None:
        raise SpecError("a run file is given twice: as an argument and with --run")
    from peftref.search.load_run import load_run

    flags: dict[str, object] = {
        "backbone": backbone, "data": data, "seed": seed, "search.trials": trials,
        "search.budget": budget, "search.max_parameters": max_params, "search.workers": workers,
        "search.memory": gpu_memory, "search.servable": _words(require),
        "search.objectives": _words(objectives),
        "output": str(output) if output is not None else None,
        "sites": str(sites) if sites is not None else None,
    }
    settings = load_run(file or run, space, flags, assignments or [])
    # The driver's sampler must not take the cores of the workers; read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if dry_run or budget is not None or gpu_memory is not None:
        bought = _bought(settings)
        if dry_run:
            print_json(asdict(bought)) if json else print_purchase(bought, settings, print_text)
            return
        print_purchase(bought, settings, note)
    _search(settings, json=json)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",")]


def _bought(run: SearchRun) -> Purchase:
    from peftref.search.purchase import purchase
    from peftref.search.run import parameter_limit
    from peftref.search.screen import BackboneScreen

    screen = BackboneScreen(run)
    return purchase(run, screen, parameter_limit(run, screen))


def print_purchase(bought: Purchase, run: SearchRun, say: Callable[[str], None]) -> None:
    """Say what a budget buys, a line at a time."""
    if bought.candidates is None:
        say("Nothing limits the number of candidates.")
    else:
        start = f"{run.search.budget:.0f} s buy" if run.search.budget is not None else "This is"
        say(f"{start} {bought.candidates} candidates of {bought.steps:,} steps each "
            f"({bought.candidate_seconds:.1f} s a training) with {run.search.workers} at once; "
            f"{bought.finals_seconds:.0f} s are kept for confirmation and test.")
    say(f"A step takes {bought.step_seconds:.3g} s, measured here alone with {bought.timed}.")
    low, high = (memory(each) for each in bought.memory)
    limit = "" if run.search.memory is None else f", limit {memory(run.search.memory)}"
    say(f"A step needs {low} to {high} as predicted{limit}.")
    if bought.candidates is not None and bought.candidates < bought.baselines:
        say(f"That is fewer than the {bought.baselines} single techniques that are tried first: "
            "allow more time or take fewer steps.")
    for name, problem in bought.refused:
        say(f"Infeasible: {name}: {problem}")


def _search(run: SearchRun, *, json: bool) -> None:
    from peftref.search.run import default_folder, model_tools, search

    folder = Path(run.output) if run.output is not None else default_folder(run)
    note(f"Run folder: {folder}. Watch it with: peftref status {folder}")
    with Screen() as screen:
        try:
            report = search(run, folder, model_tools(), screen.show)
        except KeyboardInterrupt:
            note(f"Interrupted. The same command resumes {folder}.")
            raise
    if json:
        print_json(report)
    else:
        print_result(report)


def print_result(report: dict[str, Any]) -> None:
    """Print the front, the finalists, the verdict and the test."""
    front = set(report["front"])
    members = [row for row in report["trials"] if row["number"] in front]
    rows = [
        (row["label"], row["kind"], f"{row['parameters']:,}", f"{row['score']:.4f}")
        for row in sorted(members, key=lambda row: row["parameters"])
    ]
    print_text("Front: validation score against trainable parameters (head not counted)")
    print_table(["composition", "kind", "parameters", "score"], rows, right=["parameters", "score"])
    print_text()
    _print_finalists(report["confirmed"])
    print_text(report["verdict"])
    test = report["test"]
    if test is None:
        print_text("The test split was not opened.")
    else:
        metrics = ", ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in test["metrics"].items())
        print_text(f"Held-out test, opened once for the best artifact: {metrics}")
    counts, seconds = report["counts"], report["seconds"]
    print_text(
        f"{counts['proposed']} candidates tried: {counts['trained']} trained, {counts['failed']} "
        f"failed, {counts['infeasible']} refused before training, {counts['duplicate']} repeated; "
        f"{seconds['wall']:.0f} s of wall time."
    )
    best = Path(report["folder"]) / "best"
    print_text(f"Best artifact: {best if best.is_dir() else 'none yet'}")
    print_text(f"Report: {report['folder']}/report.html")


def _print_finalists(confirmed: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = []
    for row in confirmed:
        spread = "" if row["interval"] is None else f" ± {row['interval']:.4f}"
        mean = f"{row['mean']:.4f}{spread}" if row["scores"] else "not confirmed"
        rows.append((row["label"], row["kind"], f"{row['parameters']:,}", mean,
                     str(len(row["scores"]))))
    print_text("Finalists on fresh seeds: mean and 95 % interval")
    print_table(["composition", "kind", "parameters", "score", "seeds"], rows,
                right=["parameters", "score", "seeds"])
    print_text()

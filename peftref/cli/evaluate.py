"""``peftref evaluate``: score a saved artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peftref.cli.style import print_json, print_text

__all__ = ["command"]


def command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.")],
    data: Annotated[
        str | None,
        typer.Option(help="File, folder or name of the data; left out: what it was trained on."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="test, validation or train; left out: test, or a given file whole."),
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option(help="Data of another kind: can the model tell its rows from known ones?"),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is now, if it was moved.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Score a saved artifact on labelled data, by default on its held-out test split."""
    from peftref.training.inference import evaluate_artifact
    from peftref.training.restore import open_artifact

    opened = open_artifact(artifact, backbone=backbone, device=device)
    found = evaluate_artifact(opened, data, split, batch_size=batch_size)
    told = {}
    if ood is not None:
        from peftref.training.ood import ood_artifact

        told = ood_artifact(opened, ood, data, split, batch_size=batch_size)
    if json:
        print_json({"split": found.split, "rows": found.rows, "metrics": dict(found.metrics)}
                   | ({"ood": {name: asdict(each) for name, each in told.items()}} if told else {}))
        return
    print_text(f"{found.rows} rows ({found.split})")
    for name, value in found.metrics.items():
        print_text(f"{name:10} {value:.4f}")
    for name, each in told.items():
        print_text(f"{name:10} told from {ood}: AUROC {each.auroc:.4f}, FPR@95 {each.fpr95:.4f}")

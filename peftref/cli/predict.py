"""``peftref predict``: what a saved artifact says of new rows."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from peftref.cli.style import note
from peftref.errors import DataError

__all__ = ["command"]


def command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.")],
    source: Annotated[
        str, typer.Option("--input", metavar="FILE", help="JSON lines; - is standard input.")
    ] = "-",
    target: Annotated[
        str, typer.Option("--output", metavar="FILE", help="JSON lines; - is standard output.")
    ] = "-",
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is now, if it was moved.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Longest completion of a prompt.")] = 64,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file, at the end.")
    ] = False,
) -> None:
    """Predict rows: each JSON line comes back with its label, value or completion.

    A row holds the text columns of training, such as {"text": "..."}.
    """
    if target != "-" and Path(target).exists() and not overwrite:
        raise DataError(f"{target} exists; name another output, or replace it with --overwrite")
    if source != "-" and not Path(source).is_file():
        raise DataError(f"no file {source!r} to predict")
    from peftref.training.inference import predict_rows
    from peftref.training.restore import open_artifact

    opened = open_artifact(artifact, backbone=backbone, device=device)
    count = 0
    with _reading(source) as lines, _writing(target) as out:
        rows = _rows(lines, source if source != "-" else "standard input")
        for row in predict_rows(opened, rows, batch_size=batch_size, tokens=tokens):
            out.write(json_format.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    note(f"{count} rows predicted")


def _rows(lines: TextIO, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json_format.loads(line)
        except json_format.JSONDecodeError as error:
            raise DataError(f"{name}:{number}: not a JSON object: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{number}: not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{name}:{number}: expected an object such as {{'text': '...'}}")
        yield row


@contextmanager
def _reading(source: str) -> Generator[TextIO]:
    if source == "-":
        yield sys.stdin
        return
    with Path(source).open(encoding="utf-8") as opened:
        yield opened


@contextmanager
def _writing(target: str) -> Generator[TextIO]:
    """Write beside the file and move at the end, so that a failure leaves what was there."""
    if target == "-":
        yield sys.stdout
        return
    path = Path(target)
    if not path.parent.is_dir():
        raise DataError(f"no folder {str(path.parent)!r} for the output")
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as opened:
            yield opened
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

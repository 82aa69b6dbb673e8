"""``peftref report``: write the report of a search again from what its folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftref.cli.search import print_result
from peftref.cli.style import print_json

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder of a search.")],
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write report.html and report.json of a search, finished or not, and print the result."""
    from peftref.search.report import write_report

    report = write_report(folder)
    if json:
        print_json(report)
    else:
        print_result(report)

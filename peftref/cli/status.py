"""``peftref status``: how far is the search in a folder? Reads one small file, touches nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from peftref.cli.progress import state_view
from peftref.cli.style import print_json, print_text

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder of a search.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON for a program.")] = False,
) -> None:
    """Show how far the search in a folder is; it may run in another terminal."""
    from peftref.search.folder import read_state

    state = read_state(folder)
    if json:
        print_json(state)
        return
    Console(highlight=False).print(state_view(state))
    if state["alive"]:
        print_text(f"Running as process {state['pid']}.")
    elif state["phase"] == "done":
        print_text("Finished.")
    else:
        print_text("Not running; the command that started it resumes it.")

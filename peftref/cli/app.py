"""The ``peftref`` command: finds the verb, runs it, and turns errors into one line.

A verb is a file of this folder that exports ``command``. It is imported only when it is the verb
given, so that help, ``list`` and ``check`` start without torch.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Annotated

import typer

from peftref import __version__
from peftref.errors import PeftRefError, SitesError, SpecError
from peftref.registry import load_plugin

__all__ = ["VERBS", "main"]

VERBS = {
    "init": "Write a commented run file or technique to start from.",
    "list": "List techniques, compositions and what they are made of.",
    "show": "Show what a technique is and what it does to a backbone.",
    "check": "Check specifications; with a backbone, compile them.",
    "schema": "Print the JSON schema of a kind of file.",
    "train": "Train the composition of a run file.",
    "search": "Search for compositions of high score and low cost.",
    "status": "Show how far a search is.",
    "report": "Write the report of a search.",
    "evaluate": "Evaluate a saved adapter on labelled data.",
    "predict": "Predict with a saved adapter.",
    "merge": "Fold a saved adapter into its backbone.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the input was wrong, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        words = _load_plugins(given)
        _application(words)(args=words, prog_name="peftref")
    except PeftRefError as error:
        if os.environ.get("PEFTREF_DEBUG"):
            raise
        sys.stderr.write(f"error: {error}\n")
        if isinstance(error, SitesError):
            sys.stderr.write(_save_draft(error))
        sys.exit(2)
    except (OSError, MemoryError, RecursionError) as error:
        # A full disk, a missing right, a path or value beyond what the machine can hold.
        if os.environ.get("PEFTREF_DEBUG"):
            raise
        sys.stderr.write(f"error: {_of_the_machine(error)}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _of_the_machine(error: OSError | MemoryError | RecursionError) -> str:
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"[:400]
    return "memory is full" if isinstance(error, MemoryError) else "something is nested too deep"


def _save_draft(error: SitesError) -> str:
    """Write the draft of a site row into this folder, beside any that is there; say where."""
    ends = chain([""], (f"-{number}" for number in count(2)))
    names = (f"sites-{error.model_type}{end}.yaml" for end in ends)
    try:
        path = next(path for path in map(Path, names) if not path.exists()
                    or path.read_text(encoding="utf-8") == error.draft)
        path.write_text(error.draft, encoding="utf-8")
    except OSError as problem:
        return f"A draft of a row could not be written here: {problem.strerror}\n"
    return f"A draft of a row is in {path}: correct it and give it with --sites {path}\n"


def _load_plugins(words: Sequence[str]) -> list[str]:
    """Load each ``--plugin FILE``, which may stand before or after the verb; return the rest."""
    rest: list[str] = []
    queue = iter(words)
    for word in queue:
        if word == "--":
            return [*rest, word, *queue]
        if word == "--plugin":
            path = next(queue, None)
            if path is None:
                raise SpecError("--plugin needs the path of a Python file.")
            load_plugin(path)
        elif word.startswith("--plugin="):
            load_plugin(word.removeprefix("--plugin="))
        else:
            rest.append(word)
    return rest


def _application(words: Sequence[str]) -> typer.Typer:
    """Return the application with the verb of these words loaded, and the others named."""
    verb = next((word for word in words if not word.startswith("-")), None)
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_describe)
    for name, summary in VERBS.items():
        if name == verb:
            function = importlib.import_module(f"peftref.cli.{name}").command
            app.command(name, help=_help(function) or summary, short_help=summary)(function)
        else:
            app.command(name, help=summary)(_not_loaded)
    return app


def _help(function: Callable[..., None]) -> str:
    """Return the docstring without the sections that describe arguments to programmers."""
    text = inspect.getdoc(function) or ""
    return re.split(r"\n(?:Args|Raises|Returns):\n", text)[0].strip()


def _not_loaded() -> None:
    """Stand for a verb that is not among the words: help needs its name only."""


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"peftref {__version__}\n")
        raise typer.Exit


def _describe(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
    _plugin: Annotated[
        str | None,
        typer.Option(
            "--plugin",
            metavar="FILE",
            help="Load primitives, couplings or procedures from a Python file; may be repeated, "
            "before or after the command.",
        ),
    ] = None,
) -> None:
    """Compile, train and search parameter-efficient fine-tuning techniques.

    Bad input ends with exit code 2 and one message; PEFTREF_DEBUG=1 adds the traceback.
    """

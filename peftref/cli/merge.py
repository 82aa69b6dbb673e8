"""``peftref merge``: a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftref.cli.style import print_text

__all__ = ["command"]


def command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.")],
    output: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is now, if it was moved.")
    ] = None,
) -> None:
    """Fold an artifact into its backbone and write a checkpoint that loads without peftref.

    What cannot be folded is refused with the reasons.
    """
    from peftref.training.merged import check_empty, write_merged
    from peftref.training.restore import open_artifact

    check_empty(output)
    opened = open_artifact(artifact, backbone=backbone, device="cpu")
    print_text(f"{output}: {write_merged(opened, output)}")

"""Writes ``report.json`` and ``report.html``: one file, readable without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from peftref.search.figures import figures
from peftref.search.summary import summarise

__all__ = ["write_report"]


def write_report(path: Path) -> dict[str, Any]:
    """Write the report of the run folder ``path`` and return its data.

    Raises:
        SearchError: the folder holds no search.
    """
    data = summarise(path)
    text = json.dumps(data, indent=1)
    (path / "report.json").write_text(text, encoding="utf-8")
    (path / "report.html").write_text(_html(data), encoding="utf-8")
    return data


def _html(data: dict[str, Any]) -> str:
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    plots = {
        # Our own numbers and labels, escaped by plotly for the script element they stand in.
        title: Markup(figure.to_html(full_html=False, include_plotlyjs=False,  # noqa: S704
                                     config={"displaylogo": False}))
        for title, figure in figures(data).items()
    }
    plotly = Markup(get_plotlyjs())  # noqa: S704
    return environment.from_string(source).render(**data, plots=plots, plotly=plotly)

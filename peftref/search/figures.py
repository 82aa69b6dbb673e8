"""The figures of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

__all__ = ["figures"]

_MARKS = {
    "floor": ("task head only", "x", "#777777"),
    "single": ("single technique", "circle", "#0072b2"),
    "hybrid": ("combination", "diamond", "#d55e00"),
}
_MARGIN = {"l": 60, "r": 20, "t": 40, "b": 50}
_LAYOUT: dict[str, Any] = {"template": "plotly_white", "height": 420, "margin": _MARGIN}


def figures(data: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Return the figures by title; those without data are left out."""
    found = {"Front": _front(data)}
    if data["hypervolume"]["time"]:
        found["Hypervolume over time"] = _hypervolume(data["hypervolume"])
    if data["importance"]:
        found["Importance for the score"] = _importance(data["importance"])
    found["Timeline"] = _timeline(data)
    return found


def _front(data: Mapping[str, Any]) -> go.Figure:
    trained = [row for row in data["trials"] if row["outcome"] == "trained"]
    figure = go.Figure(layout=_LAYOUT)
    for kind, (name, symbol, colour) in _MARKS.items():
        rows = [row for row in trained if row["kind"] == kind]
        figure.add_scatter(
            x=[max(row["parameters"], 1) for row in rows], y=[row["score"] for row in rows],
            text=[row["label"] for row in rows], name=name, mode="markers",
            marker={"symbol": symbol, "color": colour, "size": 9},
        )
    members = [row for row in trained if row["number"] in data["front"]]
    members.sort(key=lambda row: row["parameters"])
    figure.add_scatter(
        x=[max(row["parameters"], 1) for row in members], y=[row["score"] for row in members],
        name="front", mode="lines", line={"shape": "hv", "color": "#333333", "dash": "dot"},
    )
    shown = [row for row in data["confirmed"] if row["interval"] is not None]
    figure.add_scatter(
        x=[row["parameters"] for row in shown], y=[row["mean"] for row in shown],
        error_y={"type": "data", "array": [row["interval"] for row in shown]},
        text=[row["label"] for row in shown], mode="markers", name="fresh seeds, mean and 95 %",
        marker={"symbol": "line-ew-open", "color": "#000000", "size": 14},
    )
    figure.update_xaxes(type="log", title="trainable parameters (without the head)")
    figure.update_yaxes(title="validation score")
    return figure


def _hypervolume(data: Mapping[str, Any]) -> go.Figure:
    figure = go.Figure(layout=_LAYOUT)
    for key, name in (("all", "all candidates"), ("singles", "single techniques")):
        figure.add_scatter(x=data["time"], y=data[key], name=name, line={"shape": "hv"})
    figure.update_xaxes(title="seconds")
    figure.update_yaxes(title="score x log10 parameters")
    return figure


def _importance(data: Mapping[str, float]) -> go.Figure:
    rows = sorted(data.items(), key=lambda item: item[1])
    figure = go.Figure(layout=_LAYOUT)
    figure.add_bar(x=[value for _, value in rows], y=[name for name, _ in rows], orientation="h")
    figure.update_xaxes(title="share of the score's variation")
    return figure


def _timeline(data: Mapping[str, Any]) -> go.Figure:
    figure = go.Figure(layout={**_LAYOUT, "barmode": "overlay"})
    for outcome, colour in (("trained", "#0072b2"), ("failed", "#cc3311")):
        rows = [row for row in data["trials"] if row["outcome"] == outcome]
        figure.add_bar(
            base=[row["started"] for row in rows],
            x=[row["finished"] - row["started"] for row in rows],
            y=[f"worker {row['worker']}" for row in rows], orientation="h", name=outcome,
            text=[row["label"] for row in rows], textposition="none",
            marker={"color": colour, "line": {"color": "white", "width": 1}},
        )
    figure.update_xaxes(title="seconds")
    return figure

"""Figures of a search, from the frames of ``search.study``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from xsd.plots.style import BLUE, GREEN, GREY, INK, ORANGE, figure

OBJECTIVE_NAMES: Final = {
    "accept_length": "validation accept length",
    "latency_ms": "measured ms a drafted token",
}
_STATES: Final = {"complete": BLUE, "pruned": GREY}
_DECADES: Final = 1.5
"""A range wider than this many powers of ten is shown on a logarithmic axis."""


def history(trials: pd.DataFrame) -> go.Figure:
    """Accept length of every trial in the order they were asked for, and the best so far."""
    made = figure("Search history", "a dot a trial; the line is the best completed one so far")
    for state, colour in _STATES.items():
        part = trials[trials["state"] == state]
        made.add_scatter(
            x=part["number"],
            y=part["accept_length"],
            mode="markers",
            name=state,
            marker={"color": colour, "size": 9, "symbol": "circle" if colour == BLUE else "x"},
            customdata=part["num_epochs"],
            hovertemplate="trial %{x}, %{customdata} epochs: %{y:.3f}<extra>" + state + "</extra>",
        )
    complete = trials[trials["state"] == "complete"]
    made.add_scatter(
        x=complete["number"],
        y=complete["accept_length"].cummax(),
        mode="lines",
        line={"color": ORANGE, "width": 2, "shape": "hv"},
        name="best so far",
        hoverinfo="skip",
    )
    made.update_xaxes(title="trial")
    made.update_yaxes(title=OBJECTIVE_NAMES["accept_length"])
    return made


def importance(shares: pd.DataFrame) -> go.Figure:
    """Which parameters an objective hangs on, the weightiest on top."""
    made = figure("Importance of the parameters", "share of the variance explained (fANOVA)")
    order = shares.groupby("parameter")["importance"].max().sort_values().index
    for colour, (objective, part) in zip(
        (BLUE, ORANGE), shares.groupby("objective", sort=False), strict=False
    ):
        made.add_bar(
            x=part["importance"],
            y=part["parameter"],
            orientation="h",
            marker_color=colour,
            name=OBJECTIVE_NAMES[str(objective)],
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    made.update_xaxes(title="importance", tickformat=".0%", rangemode="tozero")
    made.update_yaxes(categoryorder="array", categoryarray=list(order))
    return made


def pareto(trials: pd.DataFrame) -> go.Figure:
    """Accept length against measured latency; the front is what no other trial beats in both."""
    made = figure("Accept length against latency", "green: no other trial is better in both")
    complete = trials[trials["state"] == "complete"].sort_values("latency_ms")
    for on_front, colour, name in ((False, GREY, "dominated"), (True, GREEN, "Pareto front")):
        part = complete[complete["on_front"] == on_front]
        made.add_scatter(
            x=part["latency_ms"],
            y=part["accept_length"],
            mode="lines+markers" if on_front else "markers",
            line={"color": colour, "width": 1.5, "shape": "hv"},
            marker={"color": colour, "size": 10},
            name=name,
            customdata=part["number"],
            hovertemplate="trial %{customdata}: %{y:.3f} at %{x:.3f} ms<extra></extra>",
        )
    made.update_xaxes(title=OBJECTIVE_NAMES["latency_ms"], rangemode="tozero")
    made.update_yaxes(title=OBJECTIVE_NAMES["accept_length"])
    return made


def parallel_coordinates(trials: pd.DataFrame, parameters: Sequence[str]) -> go.Figure:
    """A line a completed trial through its parameters to its accept length, which colours it."""
    made = figure("What good trials share", "a line a completed trial; drag an axis to filter")
    complete = trials[trials["state"] == "complete"]
    names = [name for name in parameters if name in complete and complete[name].notna().all()]
    objectives = [name for name in OBJECTIVE_NAMES if name in complete]
    made.add_parcoords(
        line={"color": complete["accept_length"], "colorscale": "Viridis", "showscale": True},
        dimensions=[_axis(name, complete[name]) for name in [*names, *objectives]],
        labelfont={"color": INK},
        tickfont={"color": INK},
    )
    made.update_layout(margin={"l": 90, "r": 60, "t": 150, "b": 40})
    return made


def _axis(name: str, values: pd.Series) -> dict[str, Any]:
    """A numeric axis, logarithmic where the values span decades; a categorical one is numbered."""
    title = {"accept_length": "accept length", "latency_ms": "latency, ms"}.get(name, name)
    if not pd.api.types.is_numeric_dtype(values):
        texts = sorted(map(str, values.unique()))
        codes = values.map(lambda value: texts.index(str(value)))
        return {
            "label": title,
            "values": codes,
            "tickvals": [*range(len(texts))],
            "ticktext": texts,
        }
    if values.min() > 0 and np.log10(values.max() / values.min()) > _DECADES:
        ticks = np.linspace(np.log10(values.min()), np.log10(values.max()), 4)
        texts = [f"{10**tick:.2g}" for tick in ticks]
        return {"label": title, "values": np.log10(values), "tickvals": ticks, "ticktext": texts}
    return {"label": title, "values": values}

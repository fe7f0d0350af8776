"""Training curves: of one adapter, and of several levels on their own accept length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from xsd.adapters.catalog import level
from xsd.plots.offline import PHASE_NAMES, SELECTION_NAMES
from xsd.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    base_level,
    end_labels,
    label,
    level_colour,
    level_line,
    panels,
)
from xsd.types import EpochReport

_PANELS = {
    "loss": "loss",
    "cos_sim_mean": "cosine to the verifier's state",
    "accept_90": "accept@0.90",
    "token_top1_match": "token match",
}


def training_frame(reports: Sequence[EpochReport]) -> pd.DataFrame:
    """Long form: epoch, step, split (train or val), metric, value, is_best."""
    return pd.DataFrame(
        [
            (report.epoch, report.step, split, metric, value, report.is_best)
            for report in reports
            for split, values in (("train", report.train), ("val", report.val))
            for metric, value in values.items()
        ],
        columns=["epoch", "step", "split", "metric", "value", "is_best"],
    )


def training_curves(name: str, reports: Sequence[EpochReport]) -> go.Figure:
    """Loss and validation metrics over optimizer steps; the kept epoch is marked."""
    frame = training_frame(reports)
    selection = level(base_level(name)).selection_metric
    names = {**_PANELS, selection: SELECTION_NAMES[selection]}
    shown = [metric for metric in names if metric in set(frame["metric"])]
    best = int(frame.loc[frame["is_best"], "step"].max())
    columns = min(3, max(1, len(shown)))
    made = panels(
        f"{name}: training",
        "train grey, validation coloured; dotted: the epoch that was kept, by accept length",
        [names[metric] for metric in shown],
        rows=-(-len(shown) // columns),
        columns=columns,
        height=150 + 260 * -(-len(shown) // columns),
        horizontal_spacing=0.08,
        vertical_spacing=0.2,
    )
    for index, metric in enumerate(shown):
        row, column = index // columns + 1, index % columns + 1
        for split in ("train", "val"):
            points = frame[(frame["metric"] == metric) & (frame["split"] == split)]
            if points.empty:
                continue
            colour = GREY if split == "train" else GREEN if metric == selection else BLUE
            made.add_scatter(
                x=points["step"],
                y=points["value"],
                mode="lines+markers" if len(points) < 40 else "lines",
                marker_size=4,
                line={"color": colour, "width": 2},
                customdata=points["epoch"],
                hovertemplate=split + " epoch %{customdata}, step %{x}: %{y:.4g}<extra></extra>",
                row=row,
                col=column,
            )
        made.add_vline(x=best, line={"color": INK, "width": 1, "dash": "dot"}, row=row, col=column)
    kept = frame[(frame["metric"] == selection) & (frame["step"] == best)]
    if len(kept):
        at = shown.index(selection)
        value = float(kept["value"].iloc[0])
        place = {"row": at // columns + 1, "column": at % columns + 1}
        label(made, best, value, f"<b>{value:.2f}</b>", GREEN, anchor="right", yshift=-14, **place)
    made.update_xaxes(title="optimizer step")
    made.update_layout(showlegend=False)
    return made


def curves_frame(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Level -> its steps and values (columns step, value), in long form with level and phase."""
    return pd.concat(
        [
            frame[["step", "value"]].assign(level=name, phase=level(base_level(name)).phase)
            for name, frame in histories.items()
        ],
        ignore_index=True,
    )


def curves_comparison(histories: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Validation accept length of several levels over optimizer steps."""
    frame = curves_frame(histories)
    phases = [phase for phase in PHASE_NAMES if phase in set(frame["phase"])]
    made = panels(
        "Training, by the metric that selects",
        "validation accept length; a dot marks the epoch that was kept",
        [PHASE_NAMES[phase] for phase in phases],
        columns=len(phases),
        height=460,
        horizontal_spacing=0.12,
    )
    for column, phase in enumerate(phases, start=1):
        part = frame[frame["phase"] == phase]
        for name, points in part.groupby("level", sort=False):
            made.add_scatter(
                x=points["step"],
                y=points["value"],
                mode="lines",
                line=level_line(str(name)),
                hovertemplate=f"{name}, step %{{x}}: %{{y:.2f}}<extra></extra>",
                row=1,
                col=column,
            )
        best = part.loc[part.groupby("level", sort=False)["value"].idxmax()]
        made.add_scatter(
            x=best["step"],
            y=best["value"],
            mode="markers",
            marker={"size": 9, "color": [level_colour(name) for name in best["level"]]},
            hoverinfo="skip",
            row=1,
            col=column,
        )
        ends = part.groupby("level", sort=False).tail(1)
        end_labels(made, ends["level"], ends["step"], ends["value"], row=1, column=column)
        metric = level(base_level(part["level"].iloc[0])).selection_metric
        made.update_yaxes(title=SELECTION_NAMES[metric], rangemode="nonnegative", row=1, col=column)
        made.update_xaxes(title="optimizer step", row=1, col=column)
    made.update_layout(showlegend=False, margin_r=60)
    return made

"""What a store weighs, and what went wrong in it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from xsd.plots.style import BLUE, GREEN, GREY, INK, ORANGE, VERMILLION, figure, label

_STATUS_COLOURS: Final = {
    "FINISHED": GREEN,
    "RUNNING": BLUE,
    "SCHEDULED": GREY,
    "KILLED": ORANGE,
    "FAILED": VERMILLION,
}
_BAR_MS: Final = 60_000_000
"""Width of a day's bar: two thirds of it, in the unit of date axes."""
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def storage_frame(runs: pd.DataFrame, num_bytes: pd.Series[float]) -> pd.DataFrame:
    """A row a stage, the heaviest first: stage, num_runs, num_bytes, num_unknown (runs that do not
    say what they weigh). A file that several runs link is counted in each."""
    frame = runs[["stage"]].assign(num_bytes=num_bytes, unknown=num_bytes.isna())
    found = frame.groupby("stage", as_index=False).agg(
        num_runs=("unknown", "size"), num_bytes=("num_bytes", "sum"), num_unknown=("unknown", "sum")
    )
    return found.sort_values("num_bytes", ascending=False).reset_index(drop=True)


def storage(frame: pd.DataFrame) -> go.Figure:
    """Bytes by stage."""
    shown = frame[frame["num_bytes"] > 0]
    made = figure(
        "What runs keep, by stage", "sum of their files", height=190 + 34 * max(1, len(shown))
    )
    made.add_bar(x=shown["num_bytes"], y=shown["stage"], orientation="h", marker_color=BLUE)
    made.update_traces(hovertemplate="%{y}: %{x:.3s}B<extra></extra>")
    columns = (shown[name].tolist() for name in ("stage", "num_bytes", "num_runs"))
    for stage, num_bytes, num_runs in zip(*columns, strict=True):
        label(made, num_bytes, stage, f"{size_text(num_bytes)}, {num_runs} runs")
    made.update_yaxes(categoryorder="array", categoryarray=list(shown["stage"])[::-1])
    made.update_yaxes(showgrid=False)
    made.update_xaxes(title="bytes", rangemode="tozero", exponentformat="SI")
    made.update_layout(margin_r=130)
    return made


def outcomes_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs a day and status: day (midnight, UTC), status, num."""
    days = runs["started"].dt.floor("D") if len(runs) else runs["started"]
    counted = pd.DataFrame({"day": days, "status": runs["status"]})
    return counted.value_counts(["day", "status"], sort=False).reset_index(name="num")


def outcomes(frame: pd.DataFrame) -> go.Figure:
    """How runs ended, day by day."""
    made = figure("How runs ended", "by the day they began (UTC)", height=320)
    for status, colour in _STATUS_COLOURS.items():
        part = frame[frame["status"] == status]
        if part.empty:
            continue
        made.add_bar(
            x=part["day"],
            y=part["num"],
            name=status.lower(),
            marker_color=colour,
            width=_BAR_MS,
            hovertemplate="%{x|%Y-%m-%d}: %{y} " + status.lower() + "<extra></extra>",
        )
    made.update_xaxes(type="date", tickformat="%d %b", nticks=12)
    if frame["day"].nunique() == 1:
        # One bar would fill the axis.
        half = pd.Timedelta(days=4)
        made.update_xaxes(range=[frame["day"].iloc[0] - half, frame["day"].iloc[0] + half])
    made.update_yaxes(title="runs", rangemode="tozero")
    made.update_layout(barmode="stack", legend_font_color=INK)
    return made


def failures_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that ended badly or lost samples, the newest first.

    Columns: run_id, experiment_id, name, started, status, num_failures (samples, as the run counted
    them) and reason.
    """
    rows: list[dict[str, Any]] = []
    for run in runs.to_dict("records"):
        tags = run["tags"]
        lost = run.get("num_failures", np.nan)
        lost = float(tags.get("num_failures", 0)) if pd.isna(lost) else float(lost)
        if run["status"] in ("FAILED", "KILLED") or lost:
            kept = {name: run[name] for name in ("run_id", "experiment_id", "name", "started")}
            reason = tags.get("xsd.error", "")
            rows.append({**kept, "status": run["status"], "num_failures": lost, "reason": reason})
    columns = ["run_id", "experiment_id", "name", "started", "status", "num_failures", "reason"]
    found = pd.DataFrame(rows, columns=columns)
    return found.sort_values("started", ascending=False, ignore_index=True)


def size_text(num_bytes: float) -> str:
    """``1.2 GB``; three digits, powers of a thousand."""
    for unit in _UNITS:
        if abs(num_bytes) < 999.5 or unit == _UNITS[-1]:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError("the last unit returns")

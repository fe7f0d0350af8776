"""Many runs at a glance: what configs and levels reach, what they cost, and how it went on.

Frames come from ``tracking.query.runs``: one row a run, metrics under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from xsd.adapters.catalog import LEVELS, level
from xsd.config import variant
from xsd.decoding.strategies import config_of, metric_name, parse_all
from xsd.errors import XsdError
from xsd.plots.offline import PHASE_NAMES, SELECTION_NAMES
from xsd.plots.style import (
    INK,
    KIND_COLOURS,
    KIND_NAMES,
    TIMES,
    base_level,
    end_labels,
    figure,
    kind,
    level_colour,
    panels,
    rgba,
)

CONFIG_METRICS: Final = (
    *("prefill_ms", "decode_ms", "total_ms", "tokens_accepted", "tau", "num_free", "speedup"),
    *("decode_speedup", "ratio_p5", "ratio_p95", "time_p95", "share_slower", "share_drafting"),
    *("num_different", "num_near_ties", "num_samples"),
)
LEVEL_METRICS: Final = (
    *("num_parameters", "cos_sim_mean", "accept_90", "token_top1_match", "accept_length"),
    "modelled.speedup_e2e",
)
_IDS: Final = ["run_id", "experiment_id", "started"]

Cost = Literal["num_parameters", "total_ms"]
COST_NAMES: Final[Mapping[Cost, str]] = {
    "num_parameters": "parameters",
    "total_ms": "measured milliseconds of an answer",
}


def configs_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a benchmark run and config: run_id, experiment_id, started, strategy, kind, lossless,
    and what was measured (``CONFIG_METRICS``; NaN where a config has no such thing), and
    modelled_speedup beside it."""
    rows: list[dict[str, Any]] = []
    for run in runs[runs["stage"] == "benchmark"].to_dict("records"):
        for strategy in _strategies(run):
            prefix = f"measured.{metric_name(strategy)}."
            values = {name: run.get(prefix + name, np.nan) for name in CONFIG_METRICS}
            modelled = f"modelled.{metric_name(strategy)}.speedup"
            values["modelled_speedup"] = run.get(modelled, np.nan)
            if pd.isna(values["speedup"]):
                continue
            changed = values["num_different"] > values["num_near_ties"]
            row = {"strategy": strategy, "kind": kind(strategy), "lossless": not changed}
            rows.append({**{name: run[name] for name in _IDS}, **row, **values})
    columns = [*_IDS, "strategy", "kind", "lossless", *CONFIG_METRICS, "modelled_speedup"]
    return pd.DataFrame(rows, columns=columns)


def levels_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """A row an evaluation: run_id, experiment_id, started, level (with what sets it apart), phase,
    reads (its inputs), and ``LEVEL_METRICS``."""
    rows: list[dict[str, Any]] = []
    for run in runs[runs["stage"] == "evaluate"].to_dict("records"):
        name = variant(run["tags"])
        if base_level(name) not in LEVELS:
            continue
        row = level(base_level(name))
        about = {"level": name, "phase": row.phase, "reads": row.inputs}
        values = {metric: run.get(metric, np.nan) for metric in LEVEL_METRICS}
        rows.append({**{key: run[key] for key in _IDS}, **about, **values})
    return pd.DataFrame(rows, columns=[*_IDS, "level", "phase", "reads", *LEVEL_METRICS])


def newest(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Of every value of column ``name`` the row that was started last, as the frame has them."""
    last = frame.sort_values("started", kind="stable").drop_duplicates(name, keep="last")
    return frame.loc[sorted(last.index)].reset_index(drop=True)


def cost_frame(levels: pd.DataFrame, configs: pd.DataFrame, cost: Cost) -> pd.DataFrame:
    """A row a level: level, phase, cost, accept_length, on_front (no other of its phase is both
    cheaper and accepted for longer). Milliseconds are those of the level's own config."""
    if cost == "num_parameters":
        costs = levels["num_parameters"]
    else:
        own = newest(configs, "strategy").set_index("strategy")["total_ms"]
        costs = levels["level"].map(lambda name: own.get(_config(name), np.nan))
    frame = levels[["level", "phase", "accept_length"]].assign(cost=costs.astype(float))
    frame = frame.dropna().reset_index(drop=True)
    front = [
        not (
            (frame["phase"] == row.phase)
            & (frame["cost"] <= row.cost)
            & (frame["accept_length"] >= row.accept_length)
            & ((frame["cost"] < row.cost) | (frame["accept_length"] > row.accept_length))
        ).any()
        for row in frame.itertuples()
    ]
    return frame.assign(on_front=front)


def cost_against_acceptance(frame: pd.DataFrame, cost: Cost) -> go.Figure:
    """What a level costs against what it gets accepted, with the Pareto front, a panel a phase."""
    phases = [phase for phase in PHASE_NAMES if phase in set(frame["phase"])]
    made = panels(
        "What acceptance costs",
        "a point a level; joined: no other is both cheaper and accepted for longer",
        [PHASE_NAMES[phase] for phase in phases],
        columns=max(1, len(phases)),
        height=440,
        horizontal_spacing=0.12,
    )
    for column, phase in enumerate(phases, start=1):
        part = frame[frame["phase"] == phase].sort_values("cost")
        front, place = part[part["on_front"]], {"row": 1, "col": column}
        made.add_scatter(
            x=front["cost"],
            y=front["accept_length"],
            mode="lines",
            line={"color": rgba(INK, 0.6), "width": 1.5, "shape": "hv"},
            hoverinfo="skip",
            **place,
        )
        made.add_scatter(
            x=part["cost"],
            y=part["accept_length"],
            mode="markers",
            cliponaxis=False,
            marker={"size": 13, "color": [level_colour(name) for name in part["level"]]},
            customdata=part["level"],
            hovertemplate="%{customdata}: %{y:.2f} for %{x:,.4~s}<extra></extra>",
            **place,
        )
        end_labels(made, part["level"], part["cost"], part["accept_length"], row=1, column=column)
        metric = level(base_level(part["level"].iloc[0])).selection_metric
        made.update_yaxes(title=SELECTION_NAMES[metric], rangemode="tozero", **place)
        made.update_xaxes(title=COST_NAMES[cost], rangemode="tozero", **place)
        made.update_xaxes(range=[0, 1.16 * part["cost"].max()], **place)
    made.update_layout(showlegend=False, margin_r=60)
    return made


def agreement_frame(configs: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """A row a config that was both measured and modelled: strategy, kind, measured, modelled.

    A config of one level takes the model of that level's evaluation, one of two levels that of
    their ``two_phase`` run; of several the newest counts.
    """
    modelled: dict[str, float] = {}
    by_age = runs[runs["stage"].isin(["evaluate", "two_phase"])].sort_values("started")
    for run in by_age.to_dict("records"):
        value = run.get("modelled.speedup_e2e", np.nan)
        if not pd.isna(value):
            name = variant(run["tags"])
            modelled[_config(name) if run["stage"] == "evaluate" else name] = float(value)
    own = newest(configs, "strategy")
    own = own[own["strategy"].isin(list(modelled))]
    return pd.DataFrame(
        {
            "strategy": own["strategy"],
            "kind": own["kind"],
            "measured": own["speedup"],
            "modelled": own["strategy"].map(modelled),
        }
    ).reset_index(drop=True)


def agreement(frame: pd.DataFrame) -> go.Figure:
    """Measured and modelled speedup, a row a config, the fastest on top."""
    rows = frame.sort_values("measured")
    made = figure(
        "Measured against modelled speedup",
        "filled: measured; hollow: modelled from assumed costs; the line is what the model missed",
        height=170 + 30 * len(rows),
    )
    made.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dot"})
    for row in rows.itertuples():
        line = {"color": rgba(KIND_COLOURS[str(row.kind)], 0.5), "width": 3}
        ends = {"x0": row.modelled, "x1": row.measured, "y0": row.strategy, "y1": row.strategy}
        made.add_shape(type="line", line=line, layer="below", **ends)
    for name, part in rows.groupby("kind", sort=False):
        colour = KIND_COLOURS[str(name)]
        for what, symbol in (("modelled", "circle-open"), ("measured", "circle")):
            made.add_scatter(
                x=part[what],
                y=part["strategy"],
                mode="markers",
                name=KIND_NAMES[str(name)],
                showlegend=what == "measured",
                marker={"color": colour, "size": 12, "symbol": symbol, "line": {"width": 2}},
                hovertemplate="%{y}: " + what + " %{x:.2f}" + TIMES + "<extra></extra>",
            )
    made.update_xaxes(title="speedup over plain decoding", ticksuffix=TIMES, rangemode="tozero")
    made.update_yaxes(categoryorder="array", categoryarray=list(rows["strategy"]), showgrid=False)
    return made


def progress(configs: pd.DataFrame) -> go.Figure:
    """Measured speedup of every config over the benchmarks' dates."""
    made = figure(
        "Measured speedup, benchmark by benchmark",
        "a point a run; only runs of one machine compare",
        height=460,
    )
    made.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"})
    drafted = configs[~configs["kind"].isin(["plain", "control"])]
    for strategy, part in drafted.sort_values("started").groupby("strategy", sort=False):
        colour = KIND_COLOURS[str(part["kind"].iloc[0])]
        made.add_scatter(
            x=part["started"],
            y=part["speedup"],
            mode="lines+markers",
            name=str(strategy),
            line={"color": rgba(colour, 0.8), "width": 1.5},
            marker={"size": 7},
            hovertemplate=f"{strategy}, %{{x|%Y-%m-%d %H:%M}}: %{{y:.2f}}{TIMES}<extra></extra>",
        )
    made.update_yaxes(title="measured speedup", ticksuffix=TIMES, rangemode="tozero")
    made.update_xaxes(title="benchmark run")
    made.update_layout(showlegend=False)
    return made


def _config(level_name: str) -> str:
    """The config of a level; of one trained on states there is none."""
    return "" if level_name.endswith(":feature") else config_of(level_name)


def _strategies(run: Mapping[Any, Any]) -> list[str]:
    """Names of a benchmark's configs, from its configuration."""
    control = run.get("cfg.control")
    control = None if control is None or pd.isna(control) or control == "null" else str(control)
    try:
        found = parse_all(str(run.get("cfg.configs")), 1, control)
    except XsdError:  # a run of another version: its newer or older configs are unknown here
        return []
    return [strategy.name for strategy in found]

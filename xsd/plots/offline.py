"""Figures of offline metrics: what is accepted, where, and what it would be worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from xsd.adapters.catalog import level
from xsd.counts import HISTOGRAM_BINS, PREFIX, THRESHOLDS, TOP, Counts, PositionCounts
from xsd.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    TIMES,
    base_level,
    end_labels,
    label,
    level_colour,
    level_line,
    panels,
    rgba,
)

Positions = Sequence[Mapping[str, float]]
"""Rows of ``PositionCounts.positions``, also after a journey through JSON."""
_MIN_NUM = 20
"""A rate of fewer answers than this is noise, and not drawn."""
_MIN_NUM_OF_FEW = 5
"""The same where a level has no more answers than that."""
PHASE_NAMES = {"gap": "levels of the prefill gap", "decode": "heads of decode"}
SELECTION_NAMES = {
    "accepted_prefix_22": f"drafts accepted in a row, of the first {PREFIX}",
    "tau_6": "tokens a verifier call, 6 drafts",
}


def histogram_frame(counts: PositionCounts) -> pd.DataFrame:
    """Columns cos_sim (middle of a bin) and share of scored positions."""
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    histogram = np.asarray(counts.cos_histogram, dtype=float)
    share = histogram / max(1.0, histogram.sum())
    return pd.DataFrame({"cos_sim": (edges[:-1] + edges[1:]) / 2, "share": share})


def consecutive_frame(counts: Counts) -> pd.DataFrame:
    """Columns what (a threshold, or tokens) and num: positions before an answer's first miss."""
    rates = counts.rates()
    rows = [(f"cos > {x:.2f}", rates[f"consecutive_mean_{round(100 * x)}"]) for x in THRESHOLDS]
    if f"accepted_prefix_{PREFIX}" in rates:
        rows.append(("tokens", rates[f"accepted_prefix_{PREFIX}"]))
    return pd.DataFrame(rows, columns=["what", "num"])


def speedup_frame(modelled: Mapping[str, float]) -> pd.DataFrame:
    """Columns what and speedup: the modelled speedups among ``modelled.*``, bounds last."""
    names = {
        "modelled.decode_speedup": "decode alone",
        "modelled.speedup_e2e": "whole answer",
        "modelled.bound_all_accepted": "if all were<br>accepted",
        "modelled.bound_free_decode": "if decode<br>were free",
    }
    rows = [(text, modelled[key]) for key, text in names.items() if key in modelled]
    return pd.DataFrame(rows, columns=["what", "speedup"])


def position_frame(positions: Mapping[str, Positions]) -> pd.DataFrame:
    """Long form over levels and their variants.

    Columns: level, phase, position, num, cos_sim, accept_90, match, num_reached,
    match_given_prefix; rates of fewer than 20 answers are NaN (of a level that was evaluated on
    fewer: than five).
    """
    frame = pd.DataFrame(
        {"level": name, "phase": level(base_level(name)).phase, **row}
        for name, rows in positions.items()
        for row in rows
    )
    least = frame.groupby("level")["num"].transform("max").ge(_MIN_NUM)
    least = least.map({True: _MIN_NUM, False: _MIN_NUM_OF_FEW})
    for column, num in (
        ("cos_sim", "num"),
        ("accept_90", "num"),
        ("match", "num"),
        ("match_given_prefix", "num_reached"),
    ):
        frame[column] = frame[column].where(frame[num] >= least)
    return frame


def selection_frame(rates: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """A row a level: level, phase, accept_90, cos_sim_mean, and accept_length, which selects it."""
    return pd.DataFrame(
        {
            "level": name,
            "phase": level(base_level(name)).phase,
            "accept_90": row["accept_90"],
            "cos_sim_mean": row["cos_sim_mean"],
            "accept_length": row[level(base_level(name)).selection_metric],
        }
        for name, row in rates.items()
    )


def metrics_summary(name: str, counts: Counts, modelled: Mapping[str, float]) -> go.Figure:
    """Two by two: cosine histogram, acceptance by position, runs, modelled speedups."""
    rates = counts.rates()
    made = panels(
        f"{name}: offline metrics",
        f"{counts.target.num_samples} answers; cos_sim {rates['cos_sim_mean']:.3f}, "
        f"accept@0.90 {rates['accept_90']:.1%}, token match {rates['token_top1_match']:.1%}",
        [
            "cosine to the verifier's state",
            "accepted at an answer position",
            "accepted in a row, from the first position",
            "modelled speedup",
        ],
        rows=2,
        columns=2,
        height=760,
        vertical_spacing=0.17,
        horizontal_spacing=0.11,
    )
    histogram = histogram_frame(counts.target)
    made.add_bar(
        x=histogram["cos_sim"], y=histogram["share"], marker_color=BLUE, width=0.045, row=1, col=1
    )
    made.add_vline(x=0.9, line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=1)
    made.update_xaxes(title="cosine", row=1, col=1)
    made.update_yaxes(title="share of positions", tickformat=".0%", row=1, col=1)
    _add_positions(made, position_frame({name: counts.target.positions()}), row=1, column=2)
    runs = consecutive_frame(counts)
    colours = [GREEN if what == "tokens" else rgba(BLUE, 0.8) for what in runs["what"]]
    _add_bars(made, runs["what"], runs["num"], colours, "{:.2f}", row=2, column=1)
    made.update_yaxes(title="positions", row=2, col=1)
    gains = speedup_frame(modelled)
    colours = [GREY if what.startswith("if") else ORANGE for what in gains["what"]]
    _add_bars(made, gains["what"], gains["speedup"], colours, "{:.2f}" + TIMES, row=2, column=2)
    made.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"}, row=2, col=2)
    made.update_yaxes(title="plain ÷ speculative", row=2, col=2)
    made.update_xaxes(tickangle=0, row=2)
    made.update_layout(showlegend=False)
    return made


def token_metrics(name: str, counts: Counts) -> go.Figure:
    """Left: the verifier's token among the k most likely. Right: top-1 hits by position."""
    rates = counts.rates()
    made = panels(
        f"{name}: token metrics",
        "through the verifier's LM head; conditional: all earlier drafts of the answer matched",
        ["verifier's token among the k most likely", "top-1 hits at an answer position"],
        columns=2,
        height=440,
        horizontal_spacing=0.11,
        column_widths=[0.36, 0.64],
    )
    shares = pd.Series([rates[f"token_top{k}_match"] for k in TOP])
    names = pd.Series([f"k = {k}" for k in TOP])
    _add_bars(made, names, shares, [BLUE] * len(TOP), "{:.1%}", row=1, column=1)
    made.update_yaxes(tickformat=".0%", range=[0, 1.08], row=1, col=1)
    frame = position_frame({name: counts.target.positions()})
    for column, text, colour in (
        ("match", "marginal", BLUE),
        ("match_given_prefix", "conditional", ORANGE),
    ):
        _add_line(made, frame, column, text, colour, row=1, column=2)
    made.update_yaxes(tickformat=".0%", range=[0, 1.08], row=1, col=2)
    made.update_xaxes(title="answer position", row=1, col=2)
    made.update_layout(legend={"x": 1, "xanchor": "right", "y": 1.1})
    return made


def acceptance_by_position(positions: Mapping[str, Positions]) -> go.Figure:
    """Several levels: marginal token hits above, given an accepted prefix below."""
    frame = position_frame(positions)
    phases = [phase for phase in PHASE_NAMES if phase in set(frame["phase"])]
    kinds = {"match": "any prefix", "match_given_prefix": "accepted prefix only"}
    made = panels(
        "Acceptance by answer position",
        "share of drafts that are the verifier's token: over all answers, and over those whose "
        "earlier drafts all matched",
        [f"{PHASE_NAMES[phase]}: {text}" for text in kinds.values() for phase in phases],
        rows=2,
        columns=len(phases),
        height=760,
        vertical_spacing=0.13,
        horizontal_spacing=0.12,
    )
    made.update_yaxes(tickformat=".0%", range=[0, 1.08])
    for column, phase in enumerate(phases, start=1):
        for row, kind in enumerate(kinds, start=1):
            part = frame[(frame["phase"] == phase) & frame[kind].notna()]
            for name, points in part.groupby("level", sort=False):
                _add_line(made, points, kind, str(name), row=row, column=column)
            ends = part.groupby("level", sort=False).tail(1)
            end_labels(made, ends["level"], ends["position"], ends[kind], row=row, column=column)
            if part["position"].max() < 6:
                made.update_xaxes(dtick=1, row=row, col=column)
        made.update_xaxes(title="answer position", row=2, col=column)
    made.update_layout(showlegend=False, margin_r=60)
    return made


def feature_against_tokens(rates: Mapping[str, Mapping[str, float]]) -> go.Figure | None:
    """Feature acceptance against accepted tokens: does the one rank as the other does?

    None: no phase has two levels that differ in their features.
    """
    frame = selection_frame(rates)
    spread = frame.groupby("phase")["accept_90"].nunique()
    phases = [phase for phase in PHASE_NAMES if spread.get(phase, 0) > 1]
    if not phases:
        return None
    made = panels(
        "Features near the verifier's are not tokens accepted",
        "a point a level; if accept@0.90 were the right target, the points would rise together",
        [PHASE_NAMES[phase] for phase in phases],
        columns=len(phases),
        height=440,
        horizontal_spacing=0.12,
    )
    for column, phase in enumerate(phases, start=1):
        part = frame[frame["phase"] == phase]
        made.add_scatter(
            x=part["accept_90"],
            y=part["accept_length"],
            mode="markers",
            cliponaxis=False,
            marker={"size": 13, "color": [level_colour(name) for name in part["level"]]},
            customdata=part[["level", "cos_sim_mean"]],
            hovertemplate="%{customdata[0]}: accept@0.90 %{x:.1%}, cos_sim %{customdata[1]:.3f}, "
            "accept length %{y:.2f}<extra></extra>",
            row=1,
            col=column,
        )
        end_labels(
            made, part["level"], part["accept_90"], part["accept_length"], row=1, column=column
        )
        metric = level(base_level(part["level"].iloc[0])).selection_metric
        made.update_yaxes(title=SELECTION_NAMES[metric], rangemode="tozero", row=1, col=column)
        # A dot at zero stands clear of the other axis's numbers.
        reach = 1.25 * max(0.04, part["accept_90"].max())
        made.update_xaxes(
            title="accept@0.90",
            tickformat=".0%",
            range=[-0.05 * reach, reach],
            row=1,
            col=column,
        )
    made.update_layout(showlegend=False, margin_r=60)
    return made


def _add_positions(made: go.Figure, frame: pd.DataFrame, *, row: int, column: int) -> None:
    """Feature and token acceptance over positions, named at their starts."""
    lines = (("accept_90", "accept@0.90", BLUE), ("match", "token match", GREEN))
    for key, text, colour in lines:
        _add_line(made, frame, key, text, colour, row=row, column=column)
    last = int(frame["position"].max())
    for (_, text, colour), y in zip(lines, (1.04, 0.95), strict=True):
        label(made, last, y, text, colour, row=row, column=column, anchor="right")
    made.update_xaxes(title="answer position", row=row, col=column)
    made.update_yaxes(tickformat=".0%", range=[0, 1.08], row=row, col=column)


def _add_line(
    made: go.Figure,
    frame: pd.DataFrame,
    key: str,
    text: str,
    colour: str | None = None,
    *,
    row: int,
    column: int,
) -> None:
    """A line in its own colour, or in that of the level that ``text`` names."""
    made.add_scatter(
        x=frame["position"],
        y=frame[key],
        mode="lines" if len(frame) > 1 else "markers",
        name=text,
        line={"color": colour, "width": 2.2} if colour else level_line(text),
        hovertemplate=text + " at %{x}: %{y:.1%}<extra></extra>",
        row=row,
        col=column,
    )


def _add_bars(
    made: go.Figure,
    names: pd.Series[str],
    values: pd.Series[float],
    colours: list[str],
    pattern: str,
    *,
    row: int,
    column: int,
) -> None:
    made.add_bar(
        x=names,
        y=values,
        marker_color=colours,
        text=[pattern.format(value) for value in values],
        textposition="outside",
        cliponaxis=False,
        showlegend=False,
        row=row,
        col=column,
    )

"""Figures of the benchmark: speedup with its spread, where time goes, what was accepted."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from xsd.decoding.config import AGAIN, BASELINE
from xsd.decoding.decoded import DRAFTING, LM_HEAD, PASSES, PIXELS, PREFILL, REST, VISION
from xsd.plots.style import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    INK,
    KIND_COLOURS,
    KIND_NAMES,
    ORANGE,
    PURPLE,
    SKY,
    TIMES,
    VERMILLION,
    figure,
    kind,
    label,
    panels,
    rgba,
)
from xsd.speedup import breakdown, measured, per_sample
from xsd.types import Trace

_ROW_HEIGHT = 34
_PART_COLOURS = {
    PIXELS: VERMILLION,
    VISION: PURPLE,
    PREFILL: BLUE,
    "prefill": BLUE,
    DRAFTING: ORANGE,
    PASSES: GREEN,
    "decode": ORANGE,
    LM_HEAD: SKY,
    REST: GREY,
}
_ON_BAR = dict.fromkeys(_PART_COLOURS.values(), "white") | {ORANGE: DARK, SKY: DARK}


def speedup_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """One row a strategy and sample (of a batch: its first): strategy, kind, sample_key, ratio
    (plain / speculative)."""
    rows = per_sample(traces).drop_duplicates(["strategy", "batch"])
    frame = rows[["strategy", "sample_key", "ratio"]]
    return frame.assign(kind=[kind(name) for name in frame["strategy"]])


def speedup_comparison(traces: Sequence[Trace]) -> go.Figure:
    """Per-sample ratios as dots, their 5th to 95th percentile, and the pooled speedup; beside it in
    how many answers a policy let drafts be verified, if not in all."""
    points, table = speedup_frame(traces), measured(traces)
    table = table[table["strategy"] != BASELINE]
    points = points[points["strategy"] != BASELINE]
    names = table["strategy"].tolist()
    made = figure(
        "Measured speedup over plain decoding",
        "a dot a sample; bar: 5th to 95th percentile; diamond: pooled (sum of times over sum)",
        height=200 + _ROW_HEIGHT * len(names),
    )
    made.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dot"})
    for group in [name for name in KIND_COLOURS if name in set(points["kind"])]:
        rows = table[table["strategy"].map(kind) == group]
        if rows.empty:
            continue
        dots = points[points["kind"] == group]
        _add_spread(made, dots, rows, group)
    for row in table.itertuples():
        verdict = "" if row.lossless else "  <b>not lossless</b>"
        # A policy that leaves its drafts off makes a config plain decoding, not a free one.
        share = f"{row.share_drafting:.0%}"
        rests = "" if share == "100%" or row.strategy == AGAIN else f"  drafting {share}"
        text = f"<b>{row.speedup:.2f}{TIMES}</b>{rests}{verdict}"
        made.add_annotation(
            x=1, xref="paper", y=row.strategy, text=text, xanchor="left", showarrow=False, xshift=8
        )
    made.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    made.update_xaxes(title="plain time ÷ speculative time", ticksuffix=TIMES)
    made.update_layout(margin_r=190)
    return made


def _add_spread(made: go.Figure, dots: pd.DataFrame, rows: pd.DataFrame, group: str) -> None:
    colour = KIND_COLOURS[group]
    made.add_trace(
        go.Box(
            x=dots["ratio"],
            y=dots["strategy"],
            orientation="h",
            boxpoints="all",
            jitter=0.6,
            pointpos=0,
            fillcolor="rgba(0,0,0,0)",
            line={"color": "rgba(0,0,0,0)"},
            marker={"color": rgba(colour, 0.4), "size": 5},
            customdata=dots["sample_key"],
            hovertemplate="%{customdata}: %{x:.2f}" + TIMES + "<extra></extra>",
            showlegend=False,
        )
    )
    for row in rows.itertuples():
        made.add_shape(
            type="line",
            x0=row.ratio_p5,
            x1=row.ratio_p95,
            y0=row.strategy,
            y1=row.strategy,
            line={"color": colour, "width": 3},
        )
    made.add_trace(
        go.Scatter(
            x=rows["speedup"],
            y=rows["strategy"],
            mode="markers",
            name=KIND_NAMES[group],
            marker={"color": colour, "size": 13, "symbol": "diamond", "line": {"width": 1}},
            hovertemplate="%{y}: pooled %{x:.3f}" + TIMES + "<extra></extra>",
        )
    )


def noise(summary: pd.DataFrame) -> str:
    """What the A/A test says of the clock; nothing where it was not measured."""
    rows = summary[summary["strategy"] == AGAIN]
    if rows.empty or not rows["num_samples"].iloc[0]:
        return ""
    row = rows.iloc[0]
    return (
        f" {AGAIN} is plain decoding once more: {row['speedup']:.3f}x, p5 to p95 "
        f"{row['ratio_p5']:.2f} to {row['ratio_p95']:.2f}, and its time p95 of "
        f"{row['time_p95']:.2f} is the clock's own noise: what configs have beyond that is theirs."
    )


def timing_breakdown(traces: Sequence[Trace]) -> go.Figure:
    """Stacked bars: the parts of an answer's time (``speedup.breakdown``)."""
    frame = breakdown(traces)
    names = frame["strategy"].drop_duplicates().tolist()
    longest_ms = frame.groupby("strategy")["ms"].sum().max()
    made = figure(
        "Where the time of an answer goes",
        "mean of the samples; the clock runs from decoded frames in host memory to the last token",
        height=190 + _ROW_HEIGHT * len(names),
    )
    for part, rows in frame.groupby("part", sort=False):
        # Too thin to be seen: no bar, no legend entry.
        if rows["ms"].max() < 0.005 * longest_ms:
            continue
        made.add_bar(
            y=rows["strategy"],
            x=rows["ms"],
            orientation="h",
            name=str(part),
            marker_color=_PART_COLOURS[str(part)],
            text=[f"{ms:.{1 if longest_ms < 100 else 0}f}" for ms in rows["ms"]],
            textposition="inside",
            textangle=0,
            insidetextanchor="middle",
            textfont_color=_ON_BAR[_PART_COLOURS[str(part)]],
            hovertemplate="%{y}: " + str(part) + " %{x:.2f} ms<extra></extra>",
        )
    for strategy, total in frame.groupby("strategy")["ms"].sum().items():
        label(made, total, str(strategy), f"{total:.{1 if longest_ms < 100 else 0}f} ms")
    made.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    made.update_xaxes(title="milliseconds", rangemode="tozero")
    made.update_layout(barmode="stack", margin_r=80)
    return made


def acceptance_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """A row a strategy that drafts: accept_rate, and an answer's tokens by origin.

    Columns ``gap`` and ``decode`` are accepted drafts, ``verifier`` the tokens it said itself.
    """
    table = measured(traces)
    table = table[table["accept_rate"].notna()]
    decode = table["tokens_accepted"] - table["gap_accepted"]
    return pd.DataFrame(
        {
            "strategy": table["strategy"],
            "accept_rate": table["accept_rate"],
            "gap": table["gap_accepted"],
            "decode": decode,
            "verifier": (table["num_tokens"] - table["tokens_accepted"]).clip(lower=0),
            "num_free": table["num_free"],
        }
    ).reset_index(drop=True)


def accept_rate_comparison(traces: Sequence[Trace]) -> go.Figure:
    """Left: share of drafts that the verifier accepted. Right: who found an answer's tokens."""
    frame = acceptance_frame(traces)
    names = frame["strategy"].tolist()
    made = panels(
        "What the verifier accepted",
        "left: of all drafts checked; right: an answer's tokens by origin, mean of the samples",
        ["accept rate", "tokens of an answer"],
        columns=2,
        height=230 + _ROW_HEIGHT * max(1, len(names)),
        shared_yaxes=True,
        column_widths=[0.38, 0.62],
        horizontal_spacing=0.06,
    )
    made.add_scatter(
        x=frame["accept_rate"],
        y=names,
        mode="markers",
        marker={"size": 11, "color": [KIND_COLOURS[kind(name)] for name in names]},
        cliponaxis=False,
        showlegend=False,
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        row=1,
        col=1,
    )
    for name, rate in zip(names, frame["accept_rate"].tolist(), strict=True):
        line = {"color": rgba(KIND_COLOURS[kind(name)], 0.45), "width": 2}
        made.add_shape(type="line", x0=0, x1=rate, y0=name, y1=name, line=line, row=1, col=1)
        label(made, rate, name, f"{rate:.0%}", row=1, column=1)
    origins = {"gap": BLUE, "decode": ORANGE, "verifier": GREY}
    titles = {"gap": "drafted in the gap", "decode": "drafted in decode", "verifier": "verifier"}
    for origin, colour in origins.items():
        made.add_bar(
            y=names,
            x=frame[origin],
            orientation="h",
            name=titles[origin],
            marker_color=colour,
            text=[f"{n:.1f}" if n >= 0.5 else "" for n in frame[origin]],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont_color=_ON_BAR[colour],
            hovertemplate="%{y}: %{x:.2f} tokens " + titles[origin] + "<extra></extra>",
            row=1,
            col=2,
        )
    made.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    made.update_xaxes(tickformat=".0%", range=[0, 1.12], tickvals=[0, 0.25, 0.5, 0.75, 1], col=1)
    made.update_xaxes(title="tokens", rangemode="tozero", col=2)
    made.update_layout(barmode="stack", margin_t=120, legend={"y": -0.12, "yanchor": "top"})
    return made

"""Figures of the benchmark: speedup with its spread, where time goes, what was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd
import plotly.graph_objects as go

from xsd.decoding.config import AGAIN, BASELINE
from xsd.decoding.decoded import DRAFTING, LM_HEAD, PASSES, PIXELS, PREFILL, REST, VISION
from xsd.decoding.strategies import parse
from xsd.plots.style import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    INK,
    KIND_COLOURS,
    KIND_NAMES,
    LEVEL_COLOURS,
    ORANGE,
    PURPLE,
    SKY,
    TIMES,
    VERMILLION,
    end_labels,
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
_MIN_NUM = 20
"""A rate of fewer drafts than this is noise, and not drawn."""
_LEGIBLE = {"minsize": 11, "mode": "hide"}
"""Text on bars that would have to shrink below this many pixels is left out."""
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
    for row, drafting in zip(table.itertuples(), table["share_drafting"].map(_rests), strict=True):
        # None: no sample was decoded that could tell.
        verdict = "  <b>not lossless</b>" if row.lossless is False else ""
        rests = "" if row.strategy == AGAIN else drafting
        text = f"<b>{row.speedup:.2f}{TIMES}</b>{rests}{verdict}"
        made.add_annotation(
            x=1, xref="paper", y=row.strategy, text=text, xanchor="left", showarrow=False, xshift=8
        )
    made.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    made.update_xaxes(title="plain time ÷ speculative time", ticksuffix=TIMES)
    made.update_layout(margin_r=190)
    return made


def _rests(share: float) -> str:
    """A policy that leaves its drafts off makes a config plain decoding, not a free one."""
    text = f"{share:.0%}"
    return "" if text == "100%" else f"  drafting {text}"


def _strength(share: float) -> float:
    """Opacity of what so many answers tell."""
    return 0.35 + 0.65 * share


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
        "means (configs table: medians); the clock runs from decoded frames in host memory to the "
        "last token",
        height=210 + _ROW_HEIGHT * len(names),
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
    # In a narrow window the legend has two rows, which grow upwards.
    made.update_layout(barmode="stack", margin={"r": 80, "t": 128}, uniformtext=_LEGIBLE)
    return made


def acceptance_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """A row a strategy that drafts: accept_rate, share_drafting (of answers), and an answer's
    tokens by origin.

    Columns ``gap`` and ``decode`` are accepted drafts, ``verifier`` the tokens it said itself.
    """
    table = measured(traces)
    table = table[table["accept_rate"].notna()]
    decode = table["tokens_accepted"] - table["gap_accepted"]
    return pd.DataFrame(
        {
            "strategy": table["strategy"],
            "accept_rate": table["accept_rate"],
            "share_drafting": table["share_drafting"],
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
        "left: of all drafts checked, pale where few answers had any; right: an answer's tokens, "
        "mean of the samples",
        ["accept rate", "tokens of an answer"],
        columns=2,
        height=300 + _ROW_HEIGHT * max(1, len(names)),
        shared_yaxes=True,
        column_widths=[0.38, 0.62],
        horizontal_spacing=0.06,
    )
    _add_rates(made, frame)
    origins = {"gap": BLUE, "decode": ORANGE, "verifier": GREY}
    titles = {"gap": "drafted in the gap", "decode": "drafted in decode", "verifier": "verifier"}
    for origin, colour in origins.items():
        made.add_bar(
            y=names,
            x=frame[origin],
            orientation="h",
            name=titles[origin],
            legend="legend2",
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
    made.update_layout(barmode="stack", uniformtext=_LEGIBLE, margin={"t": 120, "r": 90})
    below = {
        "orientation": "v",
        "traceorder": "normal",
        "yref": "container",
        "y": 0.01,
        "yanchor": "bottom",
    }
    made.update_layout(legend=below, legend2={**below, "x": made.layout.xaxis2.domain[0]})
    return made


def _add_rates(made: go.Figure, frame: pd.DataFrame) -> None:
    """A dot and its stem a config; pale is a rate that few answers gave."""
    for group, rows in frame.groupby(frame["strategy"].map(kind), sort=False):
        dot = {"size": 11, "color": KIND_COLOURS[str(group)]}
        made.add_scatter(
            x=rows["accept_rate"],
            y=rows["strategy"],
            mode="markers",
            marker={**dot, "opacity": rows["share_drafting"].map(_strength)},
            cliponaxis=False,
            showlegend=False,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
            row=1,
            col=1,
        )
        # A legend would be as pale as its dots.
        made.add_scatter(
            x=[None], y=[None], mode="markers", marker=dot, name=KIND_NAMES[str(group)],
            row=1, col=1,
        )  # fmt: skip
    columns = (frame[name].tolist() for name in ("strategy", "accept_rate", "share_drafting"))
    for name, rate, share in zip(*columns, strict=True):
        line = {"color": rgba(KIND_COLOURS[kind(name)], 0.45 * _strength(share)), "width": 2}
        made.add_shape(type="line", x0=0, x1=rate, y0=name, y1=name, line=line, row=1, col=1)
        label(made, rate, name, f"{rate:.0%}", row=1, column=1)
        label(made, 1, name, _rests(share), xref="paper", yref="y")


def depth_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """Columns strategy, phase (gap or decode), depth, accepted, verified: drafts by their depth.

    Cycles of decode: those with so many drafts or more are held against those that accepted so
    many. Of a tree only its size is recorded, so its drafts count down to the deepest that held.
    In the gap the prefill checks the first draft; where that one is refused nothing behind it is
    verified.
    """
    counts: dict[tuple[str, str, int], list[int]] = {}
    deepest: dict[str, int] = {}
    for trace in traces:
        name, held = trace.strategy, trace.gap_accepted
        cycles = [("gap", trace.gap_drafted if held else min(1, trace.gap_drafted), held)]
        for drafted, accepted in zip(trace.cycle_drafted, trace.cycle_accepted, strict=False):
            cycles.append(("decode", drafted, accepted))
            deepest[name] = max(accepted, deepest.get(name, 1))
        for phase, drafted, accepted in cycles:
            for depth in range(1, drafted + 1):
                found = counts.setdefault((name, phase, depth), [0, 0])
                found[0] += depth <= accepted
                found[1] += 1
    rows = [
        (*key, *found)
        for key, found in counts.items()
        if not (key[1] == "decode" and parse(key[0], 1).tree and key[2] > deepest[key[0]])
    ]
    columns = ["strategy", "phase", "depth", "accepted", "verified"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[:3], kind="stable")


def _depth_rates(traces: Sequence[Trace]) -> pd.DataFrame:
    """``depth_frame`` where enough was verified to speak of a share: column rate."""
    frame = depth_frame(traces)
    frame = frame[frame["verified"] >= _MIN_NUM]
    return frame.assign(rate=frame["accepted"] / frame["verified"])


def depth_table(traces: Sequence[Trace]) -> pd.DataFrame:
    """A row a phase and strategy, the gap's first: the figure's shares, a column a depth."""
    rates = _depth_rates(traces).pivot(index=["phase", "strategy"], columns="depth", values="rate")
    return rates.rename(columns=str).sort_index(level="phase", ascending=False).reset_index()


def accept_rate_by_depth(traces: Sequence[Trace]) -> go.Figure:
    """A line a config, in the gap and in decode: how deep drafts hold."""
    frame = _depth_rates(traces)
    titles = {
        "gap": "drafts in the prefill gap: the first, then those behind one that held",
        "decode": "drafts of a cycle in decode",
    }
    # A lone dot is no curve.
    phases = [phase for phase in titles if (frame["phase"] == phase).sum() > 1]
    made = panels(
        "Accept rate by position",
        "share accepted of the drafts that were verified at this depth; a policy verifies deeper "
        "where it is sure",
        [titles[phase] for phase in phases],
        rows=max(1, len(phases)),
        columns=1,
        height=170 + 330 * max(1, len(phases)),
        vertical_spacing=0.15,
    )
    where = {"gap": "position in the answer", "decode": "position behind the last token said"}
    made.update_yaxes(tickformat=".0%", range=[0, 1.04])
    for row, phase in enumerate(phases, start=1):
        part = frame[frame["phase"] == phase]
        for name, points in part.groupby("strategy", sort=False):
            _add_depths(made, str(name), points, phase, row)
        ends = part.groupby("strategy", sort=False).tail(1)
        end_labels(
            made, ends["strategy"], ends["depth"], ends["rate"], row=row, column=1,
            colour=partial(_draft_colour, phase),
        )  # fmt: skip
        reach = [0.8, part["depth"].max() + 0.2]
        made.update_xaxes(title=where[phase], dtick=1, range=reach, row=row, col=1)
    if not phases:
        made.update_xaxes(title=where["decode"], showticklabels=False, showgrid=False)
        made.add_annotation(
            text=f"no config had {_MIN_NUM} drafts verified at two positions",
            showarrow=False,
            font={"size": 14},
            xref="paper",
            yref="paper",
            x=0.5,
            y=0.5,
        )
    made.update_layout(showlegend=False, margin_r=120)
    return made


def _add_depths(made: go.Figure, name: str, points: pd.DataFrame, phase: str, row: int) -> None:
    # The gap's first draft is judged alone: no line leads from it to those of a pass.
    parts = [points[points["depth"] == 1], points[points["depth"] > 1]]
    for part in parts if phase == "gap" else [points]:
        made.add_scatter(
            x=part["depth"],
            y=part["rate"],
            mode="lines+markers",
            name=name,
            line=_draft_line(name, phase),
            marker={"size": 6},
            customdata=part[["accepted", "verified"]],
            hovertemplate=name + " at %{x}: %{y:.1%} (%{customdata[0]} of %{customdata[1]})"
            "<extra></extra>",
            cliponaxis=False,
            row=row,
            col=1,
        )


def _draft_colour(phase: str, strategy: str) -> str:
    return _draft_line(strategy, phase)["color"]


def _draft_line(strategy: str, phase: str) -> dict[str, str]:
    """Colour of the level that drafts, grey where none does; dashes for its variants."""
    found = parse(strategy, 1)
    level = found.gap if phase == "gap" else found.head
    dash = "solid"
    if found.shuffled_events:
        dash = "longdash"
    elif found.gap_mode == "free" or found.tree:
        dash = "dash"
    elif found.gap and found.head:
        dash = "dot"
    return {"color": LEVEL_COLOURS.get(str(level), GREY), "dash": dash}

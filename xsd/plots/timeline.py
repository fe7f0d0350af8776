"""Lanes of time: what drafter and verifier do, side by side, and whose token is whose."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import UInt8
from PIL import Image

from xsd.decoding.config import BASELINE
from xsd.plots.style import BLUE, DARK, GREEN, GREY, INK, ORANGE, PURPLE, TIMES, figure, label
from xsd.speedup import Costs, measured, tokens_before_decode
from xsd.types import Span, Trace

Origin = Literal["gap", "decode", "verifier"]
ORIGIN_COLOURS = {"gap": BLUE, "decode": ORANGE, "verifier": INK}
_PHASES = {
    "vision": PURPLE,
    "prefill": BLUE,
    "draft": ORANGE,
    "verify": GREEN,
    "decode": GREY,
    "wait": "rgba(128,136,150,0.25)",
}
_SPECIAL = r"</?\w+>|<\|\w+\|>"
"""Tokens that end a text, such as ``</s>``."""
_END = " \N{END OF PROOF}"
_LINE = 118
"""Characters of example text in a line of a figure 960 pixels wide."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sample to look at: both decodings, the answer in pieces, and what each model saw."""

    plain: Trace
    fast: Trace
    pieces: tuple[str, ...]
    """The answer's tokens as text, spaces included; together they read as the answer."""
    event_images: tuple[str, ...] = ()
    """Data URIs (``data_uri``), as the drafter saw them; ``frames`` likewise the verifier."""
    frames: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Example:
        return cls(
            trace_from(values["plain"]),
            trace_from(values["fast"]),
            *(tuple(values[name]) for name in ("pieces", "event_images", "frames")),
        )


def trace_from(values: Mapping[str, Any]) -> Trace:
    """The inverse of ``dataclasses.asdict``, also after a journey through JSON."""
    lists = ("token_ids", "cycle_drafted", "cycle_accepted")
    spans = tuple(Span(**span) for span in values["timeline"])
    return Trace(**{**values, **{name: tuple(values[name]) for name in lists}, "timeline": spans})


def data_uri(image: UInt8[np.ndarray, "H W 3"], size: int = 144) -> str:
    """An image as a ``data:`` URI: PNG, shrunk to at most ``size`` pixels a side."""
    picture = Image.fromarray(image)
    picture.thumbnail((size, size))
    with io.BytesIO() as buffer:
        picture.save(buffer, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def token_origins(trace: Trace) -> list[Origin]:
    """Who found each answer token: an accepted draft of the gap or of decode, or the verifier.

    Prefill yields the first token, every pass its accepted drafts and then one token of the
    verifier's own. A last pass may accept more than the answer had room for.
    """
    origins: list[Origin] = ["gap"] * trace.gap_accepted
    origins += ["verifier"] * (tokens_before_decode(trace) - len(origins))
    for num_accepted in trace.cycle_accepted:
        origins += ["decode"] * num_accepted
        origins.append("verifier")
    num_tokens = len(trace.token_ids)
    origins += ["verifier"] * (num_tokens - len(origins))
    return origins[:num_tokens]


def lanes_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """Spans of several decodings of one sample: lane (strategy, then model), what, phase, times.

    Neighbouring spans of one kind that follow each other become one bar (with their number).
    """
    rows: list[dict[str, Any]] = []
    for trace in traces:
        for model in ("drafter", "verifier"):
            spans = [span for span in trace.timeline if span.lane == model]
            lane = f"{trace.strategy}<br>{model}"
            merged: list[dict[str, Any]] = []
            for span in sorted(spans, key=lambda one: one.start_ms):
                if merged and merged[-1]["what"] == span.what:
                    merged[-1]["end_ms"] = span.end_ms
                    merged[-1]["count"] += 1
                else:
                    merged.append({"lane": lane, "phase": _phase(span.what), "count": 1})
                    merged[-1] |= {"what": span.what, "start_ms": span.start_ms}
                    merged[-1]["end_ms"] = span.end_ms
            rows += merged
    return pd.DataFrame(rows, columns=["lane", "what", "phase", "start_ms", "end_ms", "count"])


def prefill_hiding(example: Example, traces: Sequence[Trace]) -> go.Figure:
    """Both decodings on one clock, what each model saw, and the answer with its drafts marked.

    ``traces``: all of the benchmark that ``example`` was picked from, for what is usual there.
    """
    plain, fast = example.plain, example.fast
    frame = lanes_frame([plain, fast])
    text = answer_html(example)
    # From top to bottom, in pixels: images, legend, lanes, axis, question and answer.
    images = 100 if example.frames or example.event_images else 0
    lanes, words = 64 * max(1, frame["lane"].nunique()), 20 * (text.count("<br>") + 2)
    inner = images + 46 + lanes + 62 + words
    made = figure(
        "What prefill hides" if fast.num_free else "What drafting saves",
        f"{fast.strategy} against plain decoding, one sample: "
        f"{_become(plain.total_ms, fast.total_ms)}<br>{_picked(fast, traces)}",
        height=inner + 116 + 20,
    )
    top, bottom = (words + 62 + lanes) / inner, (words + 62) / inner
    draw_lanes(made, frame)
    made.update_yaxes(domain=[bottom, top])
    made.update_layout(margin={"t": 116, "b": 20}, legend_y=top + 16 / inner)
    _add_images(made, "drafter: events", example.event_images, left=0.0, size=images / inner)
    _add_images(made, "verifier: frames", example.frames, left=0.52, size=images / inner)
    if fast.num_free:
        ready = f"{fast.num_free} drafts ready"
        made.add_vline(x=fast.prefill_ms, line={"color": INK, "width": 1, "dash": "dot"})
        label(made, fast.prefill_ms, 1.0, ready, yref="y domain", yanchor="bottom")
    _add_answer(made, fast.question, text, y=words / inner)
    return made


def lanes(example: Example) -> go.Figure:
    """Both decodings on one clock alone, for a page that shows images and answer itself."""
    plain, fast = example.plain, example.fast
    frame = lanes_frame([plain, fast])
    made = figure(
        "What prefill hides" if fast.num_free else "What drafting saves",
        _become(plain.total_ms, fast.total_ms),
        height=150 + 64 * max(1, frame["lane"].nunique()),
    )
    draw_lanes(made, frame)
    if fast.num_free:
        made.add_vline(x=fast.prefill_ms, line={"color": INK, "width": 1, "dash": "dot"})
    return made


def stage_frame(
    costs: Costs, num_tokens: int, num_accepted: int | None, decode_speedup: float
) -> pd.DataFrame:
    """The modelled answer as lanes: plain decoding above, prefill hiding and decode below.

    Columns as of ``lanes_frame``. All from ``costs``; nothing here was timed. ``num_accepted`` None
    means that nothing drafts in the gap.
    """
    step, slowdown = costs.step_ms / decode_speedup, costs.verifier_slowdown
    rows = [
        ("plain<br>verifier", "prefill", 0.0, costs.verifier_prefill_ms),
        ("plain<br>verifier", "decode", costs.verifier_prefill_ms, costs.plain_ms(num_tokens)),
    ]
    drafter, verifier = "speculative<br>drafter", "speculative<br>verifier"
    free, verify = 0, 0.0
    prefill = (slowdown if num_accepted is not None else 1.0) * costs.verifier_prefill_ms
    if num_accepted is not None:
        free = costs.num_free(num_tokens)
        ready = costs.drafter_slowdown * costs.drafter_prefill_ms
        draft = costs.drafter_slowdown * (costs.drafter_step_ms + costs.adapter_ms)
        rows.append((drafter, "prefill", 0.0, ready))
        rows.append((drafter, "draft", ready, ready + max(0, free - 1) * draft))
        verify = costs.verify_ms(free) if min(free, num_accepted) and num_tokens > 1 else 0.0
    num_left = max(0, num_tokens - 1 - min(free, num_accepted or 0))
    rows.append((verifier, "prefill", 0.0, prefill))
    rows.append((verifier, "verify", prefill, prefill + verify))
    end = prefill + verify + num_left * step
    rows.append((verifier, f"decode at {step:.1f} ms a token", prefill + verify, end))
    frame = pd.DataFrame(rows, columns=["lane", "what", "start_ms", "end_ms"])
    frame = frame.assign(phase=frame["what"].map(_phase), count=1)
    return frame[frame["end_ms"] > frame["start_ms"]].reset_index(drop=True)


def stage_timeline(
    costs: Costs, num_tokens: int, num_accepted: int | None, decode_speedup: float = 1.0
) -> go.Figure:
    """Plain decoding against the modelled pipeline, for an answer of average length.

    Args:
        num_accepted: drafts of the gap that match; None: the gap is not used.
    """
    frame = stage_frame(costs, num_tokens, num_accepted, decode_speedup)
    is_plain = frame["lane"].str.startswith("plain")
    plain, fast = (frame.loc[rows, "end_ms"].max() for rows in (is_plain, ~is_plain))
    parts = [f"{num_tokens} tokens"]
    if num_accepted is not None:
        drafts = "draft" if num_accepted == 1 else "drafts"
        parts.append(f"{num_accepted} {drafts} accepted in the gap")
    if decode_speedup != 1:
        parts.append(f"decode speedup {decode_speedup:.2f}")
    made = figure(
        "Modelled stages of one answer",
        f"{', '.join(parts)}: {_become(plain, fast)}, modelled",
        height=330,
    )
    draw_lanes(made, frame)
    return made


def draw_lanes(made: go.Figure, frame: pd.DataFrame) -> None:
    """Horizontal bars, a lane a row, labelled inside where the label fits."""
    span = frame["end_ms"].max() if len(frame) else 1.0
    for phase, colour in _PHASES.items():
        rows = frame[frame["phase"] == phase]
        if rows.empty:
            continue
        widths = rows["end_ms"] - rows["start_ms"]
        fits = widths > span * 0.009 * (rows["what"].str.len() + 2)
        made.add_bar(
            x=widths,
            base=rows["start_ms"],
            y=rows["lane"],
            orientation="h",
            name=phase,
            marker={"color": colour, "line": {"width": 0}},
            width=0.62,
            text=rows["what"].where(fits, ""),
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": DARK if phase == "draft" else "white", "size": 12},
            customdata=rows[["what", "count", "end_ms"]].to_numpy(),
            hovertemplate="%{customdata[0]} (%{customdata[1]}): "
            "%{base:.1f} to %{customdata[2]:.1f} ms<extra></extra>",
        )
    lanes = list(dict.fromkeys(frame["lane"]))
    made.update_yaxes(categoryorder="array", categoryarray=lanes[::-1], showgrid=False)
    made.update_xaxes(title="milliseconds since the clock started", rangemode="tozero")
    made.update_layout(barmode="overlay")


def answer_html(example: Example) -> str:
    """The answer in lines, accepted drafts coloured by where they were drafted."""
    lines, line, length = [], "", 0
    for piece, origin in zip(example.pieces, token_origins(example.fast), strict=False):
        if length + len(piece) > _LINE and piece.startswith(" "):
            lines.append(line)
            line, length = "", 0
        words = escape(plain_piece(piece if line else piece.lstrip()))
        colour = ORIGIN_COLOURS[origin]
        marked = (
            words if origin == "verifier" else f'<b><span style="color:{colour}">{words}</span></b>'
        )
        line, length = line + marked, length + len(piece)
    return "<br>".join([*lines, line])


def plain_piece(piece: str) -> str:
    """A token's text; the one that ends an answer becomes a sign."""
    return _END if re.fullmatch(_SPECIAL, piece) else piece


def _become(plain_ms: float, fast_ms: float) -> str:
    """Two times and their ratio, with a decimal where whole milliseconds would hide it."""
    is_fine = min(plain_ms, fast_ms) < 20 or f"{plain_ms:.0f}" == f"{fast_ms:.0f}"
    before, after = (f"{ms:.{1 if is_fine else 0}f} ms" for ms in (plain_ms, fast_ms))
    return f"{before} become {after} ({plain_ms / fast_ms:.2f}{TIMES})"


def _picked(fast: Trace, traces: Sequence[Trace]) -> str:
    """Why this sample of all, and what its config does in the others."""
    own = [trace for trace in traces if trace.strategy == fast.strategy]
    row = measured([trace for trace in traces if trace.strategy == BASELINE] + own).iloc[-1]
    usual = f"{row['speedup']:.2f}{TIMES} over all samples"
    if not fast.gap_accepted:
        return f"picked for its drafts; the config is {usual}"
    left_off = sum(not trace.gap_drafted for trace in own) / len(own)
    if not left_off:
        return f"picked for its gap drafts; the config is {usual}"
    return (
        f"picked for its gap drafts; the policy leaves the gap off in {left_off:.1%} of this "
        f"config's answers ({usual})"
    )


def _phase(what: str) -> str:
    """The colour group of a span's name, such as ``draft`` of ``draft 3``."""
    return next((phase for phase in _PHASES if phase in what), "decode")


def _add_answer(made: go.Figure, question: str, text: str, y: float) -> None:
    head = f"<i>{escape(question)}</i>"
    key = (
        f'<span style="color:{BLUE}"><b>accepted drafts of the gap</b></span>, '
        f'<span style="color:{ORANGE}"><b>of decode</b></span>, and the verifier\'s own'
    )
    made.add_annotation(
        x=0,
        y=y,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="top",
        align="left",
        showarrow=False,
        text=f"{head}  ({key})<br>{text}",
        font={"size": 14},
    )


def _add_images(
    made: go.Figure, title: str, images: Sequence[str], *, left: float, size: float
) -> None:
    """A row of thumbnails at the top; five fit into a half, so of more every second is shown."""
    while len(images) > 5:
        images = images[::2]
    if not images:
        return
    place = {"xref": "paper", "yref": "paper", "xanchor": "left"}
    made.add_annotation(
        x=left, y=1, yanchor="bottom", text=title, showarrow=False, font={"size": 12}, **place
    )
    step = 0.48 / max(4, len(images))
    for index, image in enumerate(images):
        made.add_layout_image(
            source=image,
            x=left + index * step,
            y=1,
            sizex=step * 0.94,
            sizey=size,
            yanchor="top",
            sizing="contain",
            **place,
        )

"""How every figure looks: one template, one palette, one colour for one thing.

Backgrounds are transparent and all neutral ink is a grey that reads on white and on black, so a
figure needs no second version for a dark page. Hues follow Okabe and Ito's palette for colour-blind
readers, a little lighter where the original is too dark for a dark page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Final, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from xsd.decoding.config import AGAIN, GOING_ON, HEAD_LEVELS
from xsd.decoding.strategies import parse

INK: Final = "#7a8291"
FAINT: Final = "rgba(128,136,150,0.22)"
BLUE: Final = "#2b8cc4"
SKY: Final = "#7cc0ea"
ORANGE: Final = "#e69f00"
VERMILLION: Final = "#dd6b20"
GREEN: Final = "#15a37a"
PURPLE: Final = "#b779b0"
GREY: Final = "#8d95a3"
DARK: Final = "#1c2026"
"""Text on a light bar."""
TIMES: Final = "\N{MULTIPLICATION SIGN}"

LEVEL_COLOURS: Final = {
    **{"L1": SKY, "L2": BLUE, "L3": GREEN, "L4": ORANGE, "X1": VERMILLION},
    # Heads are never drawn in one panel with the levels above.
    **{"L5": SKY, "B1": BLUE, "L5F": GREEN, "E1": ORANGE, "E2": PURPLE, "E3": VERMILLION},
    "text": GREY,
}

_DASHES: Final = {"": "solid", "feature": "dot", "free": "dash"}

Kind = Literal["plain", "gap", "decode", "both", "control"]
KIND_COLOURS: Final[dict[str, str]] = {
    "plain": GREY,
    "gap": BLUE,
    "decode": ORANGE,
    "both": GREEN,
    "control": PURPLE,
}
KIND_NAMES: Final[dict[str, str]] = {
    "plain": "plain decoding",
    "gap": "drafts in the prefill gap",
    "decode": "drafts in decode",
    "both": "both",
    "control": "control",
}

_FONT: Final = "Inter, 'Source Sans 3', 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_AXIS: Final = {
    "gridcolor": FAINT,
    "zeroline": False,
    "linecolor": FAINT,
    "ticks": "",
    "ticklabelstandoff": 6,
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 13}},
    "tickfont": {"size": 12},
}
TEMPLATE: Final = go.layout.Template(
    layout={
        "font": {"family": _FONT, "size": 13, "color": INK},
        "title": {
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 16},
            "font": {"size": 18},
            "subtitle": {"font": {"size": 13, "color": INK}},
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": [BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 70, "r": 30, "t": 108, "b": 60},
        "hoverlabel": {"font": {"family": _FONT, "size": 12}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "xanchor": "left",
            "yanchor": "bottom",
            "traceorder": "normal",
            "bgcolor": "rgba(0,0,0,0)",
        },
        "bargap": 0.35,
    }
)


def figure(title: str, subtitle: str = "", *, width: int = 960, height: int = 480) -> go.Figure:
    """An empty figure of the house style, sizes in pixels."""
    return _dress(go.Figure(), title, subtitle, width, height)


def panels(
    title: str,
    subtitle: str,
    names: Sequence[str],
    *,
    rows: int = 1,
    columns: int,
    width: int = 960,
    height: int = 480,
    **layout: object,
) -> go.Figure:
    """Small multiples; ``names`` are the panels' headings, row by row."""
    made = make_subplots(rows=rows, cols=columns, subplot_titles=list(names), **layout)
    made.update_annotations(font={"size": 14, "color": INK})
    return _dress(made, title, subtitle, width, height)


def label(
    target: go.Figure,
    x: float | int,
    y: object,
    text: str,
    colour: str = INK,
    *,
    row: int | None = None,
    column: int | None = None,
    anchor: str = "left",
    **more: object,
) -> None:
    """Write a direct label beside the point that it names."""
    target.add_annotation(
        x=x,
        y=y,
        text=text,
        showarrow=False,
        xanchor=anchor,
        xshift={"left": 6, "right": -6}.get(anchor, 0),
        font={"color": colour, "size": 12},
        row=row,
        col=column,
        **more,
    )


def end_labels(
    target: go.Figure,
    names: Iterable[str],
    xs: Iterable[float],
    ys: Iterable[float],
    *,
    row: int,
    column: int,
    colour: Callable[[str], str] | None = None,
) -> None:
    """Write names right of their points, moved vertically off lines and off each other.

    ``colour``: of a name; None: they are levels.

    The panel's size is read from the figure; the scale of heights from the axis, so set its range
    first, or else from the points of its traces.
    """
    axis = next(target.select_yaxes(row=row, col=column))
    low, high = axis.range or _span(target, axis, "y")
    bottom, top = axis.domain or (0.0, 1.0)
    pixels = (target.layout.height - 170) * (top - bottom)
    gap = 15 * ((high - low) or 1.0) / max(1.0, pixels)
    left, right = next(target.select_xaxes(row=row, col=column)).domain or (0.0, 1.0)
    first, last = _span(target, axis, "x")
    letter = 7 * (last - first) / ((target.layout.width - 130) * (right - left))
    stacks: list[list[tuple[float, float, float, str]]] = []
    for x, y, name in sorted(zip(xs, ys, names, strict=True)):
        if not stacks or x - stacks[-1][-1][1] > letter * (1 + len(stacks[-1][-1][3])):
            stacks.append([])
        reach = x + letter * (1 + len(name))
        stacks[-1].append((_clear(target, axis, (x, reach), y, gap), x, y, name))
    for stack in stacks:
        points = sorted(stack, key=lambda point: point[0])
        heights = [point[0] for point in points]
        places = _apart(heights, gap, max(high, *heights))
        for (_, x, y, name), place in zip(points, places, strict=True):
            shift = (place - y) / gap * 15
            ink = (colour or level_colour)(name)
            label(target, x, y, name, ink, row=row, column=column, yshift=shift)


def _clear(
    target: go.Figure, axis: go.layout.YAxis, reach: tuple[float, float], y: float, gap: float
) -> float:
    """The height nearest to ``y`` where a label of this reach lies on none of its panel's lines;
    ``y`` where that is further than ``gap``."""
    ahead = np.linspace(*reach, 9)[1:]
    lines = [np.interp(ahead, t.x, t.y, right=np.nan) for t in _drawn(target, axis) if _is_line(t)]
    for step in (0.0, 0.5, -0.5, 1.0, -1.0):
        if not any((np.abs(line - y - step * gap) < gap / 2).any() for line in lines):
            return y + step * gap
    return y


def _is_line(trace: go.Scatter) -> bool:
    return "lines" in (trace.mode or "") and len(trace.x) > 1


def _drawn(target: go.Figure, axis: go.layout.YAxis) -> list[go.Scatter]:
    wanted = axis.plotly_name.replace("axis", "")
    return [trace for trace in target.data if (trace.yaxis or "y") == wanted]


def _apart(heights: Sequence[float], gap: float, limit: float) -> list[float]:
    """Ascending heights, moved as little as leaves ``gap`` between neighbours, up to ``limit``.

    Least squares: of heights less their gaps, neighbours that fall are pooled to their mean.
    """
    pools: list[list[float]] = []
    for index, height in enumerate(heights):
        pools.append([height - index * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    means = [fmean(pool) for pool in pools for _ in pool]
    most = limit - (len(heights) - 1) * gap
    return [min(mean, most) + index * gap for index, mean in enumerate(means)]


def _span(target: go.Figure, axis: go.layout.YAxis, key: Literal["x", "y"]) -> tuple[float, float]:
    """Lowest (of heights: at most 0) and highest of what the panel of this y axis draws."""
    drawn = [float(v) for trace in _drawn(target, axis) for v in trace[key]]
    drawn = [value for value in drawn if value == value]
    return min([0.0, *drawn] if key == "y" else drawn, default=0.0), max(drawn, default=1.0)


def level_colour(name: str) -> str:
    """Colour of a level, or of a variant of it such as ``L4:feature``."""
    return LEVEL_COLOURS[base_level(name)]


def level_line(name: str) -> dict[str, object]:
    """Line style of a level; its variants share the colour and differ in their dashes."""
    dash = _DASHES.get(name.partition(":")[2], "dashdot")
    return {"color": level_colour(name), "width": 2.2, "dash": dash}


def base_level(name: str) -> str:
    """``L4:feature`` -> ``L4``."""
    return name.partition(":")[0]


def plotly_js() -> str:
    """Plotly's own script, to be embedded once in a page of many figures."""
    return str(get_plotlyjs())


def kind(strategy: str) -> Kind:
    """What sort of strategy a name is, for its colour."""
    row = parse(strategy, 1)
    if (
        row.shuffled_events
        or row.name == AGAIN
        or row.gap in ("drafter", "template")
        or (row.head is not None and row.head not in (*HEAD_LEVELS, GOING_ON))
    ):
        return "control"
    if row.gap and row.head:
        return "both"
    return "gap" if row.gap else "decode" if row.head else "plain"


def rgba(colour: str, alpha: float) -> str:
    """``#rrggbb`` with an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _dress(made: go.Figure, title: str, subtitle: str, width: int, height: int) -> go.Figure:
    made.update_layout(
        template=TEMPLATE,
        title={"text": f"<b>{title}</b>", "subtitle": {"text": subtitle}},
        width=width,
        height=height,
    )
    return made

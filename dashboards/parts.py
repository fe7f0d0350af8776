"""The pieces that the live dashboard's pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dash import dcc, html

from dashboards.tables import Column, Table
from xsd.plots.timeline import Example, plain_piece, token_origins

Part = Any
"""A Dash component, or text."""


@dataclass(frozen=True)
class Order:
    """How a reader wants a table sorted."""

    table: str = ""
    column: str = ""
    descending: bool = True


def card(title: str, *parts: Part, note: str = "", kind: str = "") -> Part:
    """A titled box; empty parts are left out."""
    kept = [part for part in parts if part is not None]
    head = [html.H2(title), *([html.P(note, className="soft")] if note else [])]
    return html.Section([*head, *kept], className=f"card {kind}".strip())


def graph(made: Any, *, kind: str = "") -> Part:
    """A figure that takes the width it finds; its title becomes the card's."""
    title = made.layout.title
    head, note = title.text.removeprefix("<b>").removesuffix("</b>"), title.subtitle.text or ""
    top = made.layout.margin.t or 108
    made.update_layout(title={"text": "", "subtitle": {"text": ""}}, width=None, autosize=True)
    has_room = made.layout.showlegend is not False or made.layout.annotations
    margin = 48 if has_room else 16
    height = made.layout.height - top + margin
    made.update_layout(margin_t=margin, margin_b=56, height=height)
    drawn = dcc.Graph(
        figure=made,
        responsive=True,
        style={"height": f"{height}px"},
        config={"displayModeBar": False, "displaylogo": False},
    )
    return card(
        head, html.Div(html.Div(drawn, className="plot"), className="wide"), note=note, kind=kind
    )


def tiles(values: Mapping[str, str]) -> Part:
    """The few numbers that matter: caption -> value."""
    cells = [html.Div([html.Strong(value), html.Span(name)]) for name, value in values.items()]
    return html.Div(cells, className="tiles")


def table(name: str, made: Table, order: Order, links: Mapping[str, str] | None = None) -> Part:
    """A table whose headings sort it.

    Args:
        name: of the table, by which ``order`` means it.
        links: run id -> address; then the first column leads to the row's run.

    Where the frame has a column ``kind``, the first cell wears its colour. Groups are parted until
    a reader sorts.
    """
    frame, columns, breaks = made.frame, made.shown(), made.breaks()
    if order.table == name and order.column in frame:
        frame, breaks = (
            frame.sort_values(
                order.column, ascending=not order.descending, kind="stable", na_position="last"
            ),
            [],
        )
    head = [html.Th(_heading(name, column, order)) for column in columns]
    rows = []
    for index, row in enumerate(frame.to_dict("records")):
        cells: list[Part] = [column.text(row[column.key]) for column in columns]
        address = (links or {}).get(str(row.get("run_id")))
        if address:
            cells[0] = html.A(cells[0], href=address, target="_blank", title="its run in MLflow")
        if "kind" in row:
            cells[0] = html.Span(cells[0], className=f"dot {row['kind']}")
        group = "group" if index in breaks else ""
        rows.append(html.Tr([html.Td(cell) for cell in cells], className=group))
    body = html.Table([html.Thead(html.Tr(head)), html.Tbody(rows)])
    return html.Div(body, className="wide")


def _heading(name: str, column: Column, order: Order) -> Part:
    mark = ""
    if order == Order(name, column.key, order.descending):
        mark = (
            " \N{BLACK DOWN-POINTING SMALL TRIANGLE}"
            if order.descending
            else " \N{BLACK UP-POINTING SMALL TRIANGLE}"
        )
    identity = {"type": "sort", "table": name, "column": column.key}
    return html.Button(column.title + mark, id=identity, n_clicks=0, className="sort")


def empty(what: str) -> Part:
    """Says what is missing, and what would make it."""
    return html.P(what, className="empty")


def picker(name: str, caption: str, options: Iterable[tuple[str, str]], value: str | None) -> Part:
    """A labelled dropdown; options are (value, caption)."""
    listed = [{"value": one, "label": text} for one, text in options]
    chosen = dcc.Dropdown(id=name, options=listed, value=value, clearable=False)
    return html.Label([html.Span(caption), chosen], className="field")


def answer(example: Example) -> Part:
    """The answer, accepted drafts marked by where they were drafted."""
    if len(example.pieces) != len(example.fast.token_ids):
        text: list[Part] = ["".join(example.pieces)]
    else:
        origins = token_origins(example.fast)
        text = [
            html.Span(plain_piece(piece), className=f"token {origin}")
            for piece, origin in zip(example.pieces, origins, strict=True)
        ]
    key = [
        html.Span("accepted draft of the gap", className="token gap"),
        html.Span("accepted draft of decode", className="token decode"),
        html.Span("the verifier's own", className="token verifier"),
    ]
    return html.Div(
        [
            html.P(example.fast.question, className="question"),
            html.P(text, className="answer"),
            html.P(key, className="key"),
        ]
    )


def pictures(title: str, images: Sequence[str]) -> Part:
    """A strip of thumbnails."""
    shown = [
        html.Img(src=image, alt=f"{title}, {n} of {len(images)}")
        for n, image in enumerate(images, 1)
    ]
    return html.Figure([html.Figcaption(title), html.Div(shown, className="strip")])

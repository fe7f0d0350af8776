"""The live dashboard: filters, pages, and looking again while it is open."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update

from dashboards import archive, parts, views
from dashboards.archive import Archive, Choice
from dashboards.parts import Order, Part
from xsd.plots.overview import COST_NAMES
from xsd.tracking import query

PAGES = {
    "/": "Overview",
    "/levels": "Levels",
    "/speed": "Speed",
    "/sample": "One answer",
    "/sweeps": "Sweeps",
    "/upkeep": "Storage and failures",
}
_LOOK_AGAIN_MS = 30_000
_SHELL = """<!doctype html>
<html lang="en">
<head>
{%metas%}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{%title%}</title>
<script>document.documentElement.dataset.theme = localStorage.getItem("xsd-theme")
  || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");</script>
<style>PAGE_CSS</style>
{%css%}
</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def build(runs: Archive, ui: str | None = None) -> Dash:
    """The application, over ``runs``.

    Args:
        ui: address of the MLflow UI that runs are linked to; None: as the store says.
    """
    folder = Path(__file__).parent
    app = Dash(
        "xsd dashboard",
        title="xsd",
        update_title=None,
        assets_folder=str(folder / "assets"),
        serve_locally=True,
        suppress_callback_exceptions=True,
    )
    app.index_string = _SHELL.replace("PAGE_CSS", (folder / "page.css").read_text(encoding="utf-8"))
    app.layout = lambda: _layout(runs)
    _add_filters(app, runs)
    _add_pages(app, runs, ui)
    return app


def _layout(runs: Archive) -> Part:
    """What a reader who opens or reloads the page gets: the runs as they are by then."""
    runs.refresh()
    frame = runs.runs()
    pairs = sorted(filter(None, set(frame["pair"])))
    days: list[str | None] = [*sorted(frame["started"].astype(str).str[:10])] or [None]
    fields = [
        html.Label(
            [html.Span("pair"), dcc.Dropdown(pairs, id="pair", placeholder="all pairs")],
            className="field",
        ),
        html.Label(
            [
                html.Span("runs begun"),
                dcc.DatePickerRange(
                    id="days",
                    min_date_allowed=days[0],
                    max_date_allowed=days[-1],
                    initial_visible_month=days[-1],
                    display_format="D MMM YYYY",
                    start_date_placeholder_text="first",
                    end_date_placeholder_text="last",
                    clearable=True,
                    number_of_months_shown=1,
                ),
            ],
            className="field",
        ),
        html.Label(
            [
                html.Span("tags"),
                dcc.Dropdown(
                    archive.tag_names(frame), id="tags", multi=True, placeholder="any tag"
                ),
            ],
            className="field grow",
        ),
    ]
    head = [
        html.H1("xsd"),
        html.Nav([dcc.Link(text, href=path, id=f"to{path}") for path, text in PAGES.items()]),
        html.Button("look again", id="again", title="read every run anew"),
        html.Button("light / dark", id="theme"),
    ]
    return html.Div(
        [
            dcc.Location(id="url"),
            dcc.Store(id="choice"),
            dcc.Store(id="order"),
            dcc.Store(id="version", data=0),
            dcc.Interval(id="clock", interval=_LOOK_AGAIN_MS),
            html.Header(head),
            html.Div(fields, className="filters"),
            html.Main(dcc.Loading(html.Div(id="page"), delay_show=400, type="dot")),
        ]
    )


def _add_filters(app: Dash, runs: Archive) -> None:
    """What is filtered by stands in the address, so that a view can be sent to somebody."""

    @app.callback(
        Output("choice", "data"),
        Output("url", "search"),
        Output("pair", "value"),
        Output("days", "start_date"),
        Output("days", "end_date"),
        Output("tags", "value"),
        Input("url", "search"),
        Input("pair", "value"),
        Input("days", "start_date"),
        Input("days", "end_date"),
        Input("tags", "value"),
    )
    def choose(
        search: str | None, pair: str | None, since: str | None, until: str | None,
        tags: list[str] | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        if set(ctx.triggered_prop_ids.values()) & {"pair", "days", "tags"}:
            choice = Choice(pair, since, until, tuple(tags or ()))
            return written(choice), to_search(choice), *[no_update] * 4
        choice = from_search(search or "")
        return (
            written(choice),
            no_update,
            choice.pair,
            choice.since,
            choice.until,
            list(choice.tags),
        )

    @app.callback(
        Output("version", "data"),
        Output("tags", "options"),
        Output("pair", "options"),
        Input("clock", "n_intervals"),
        Input("again", "n_clicks"),
        State("version", "data"),
        prevent_initial_call=True,
    )
    def look_again(_: int | None, __: int | None, version: int) -> tuple[Any, Any, Any]:
        asked = ctx.triggered_id == "again"
        if not runs.refresh(whole=asked) and not asked:
            return no_update, no_update, no_update
        frame = runs.runs()
        return version + 1, archive.tag_names(frame), sorted(filter(None, set(frame["pair"])))

    @app.callback(
        Output("order", "data"),
        Input({"type": "sort", "table": ALL, "column": ALL}, "n_clicks"),
        State("order", "data"),
        prevent_initial_call=True,
    )
    def sort(clicks: Sequence[int], order: dict[str, Any] | None) -> Any:
        asked = ctx.triggered_id
        if not any(clicks) or not isinstance(asked, dict):
            return no_update
        same = order and (order["table"], order["column"]) == (asked["table"], asked["column"])
        descending = not order["descending"] if order and same else True
        return {"table": asked["table"], "column": asked["column"], "descending": descending}


def _add_pages(app: Dash, runs: Archive, ui: str | None) -> None:
    watched = (Input("choice", "data"), Input("version", "data"), Input("order", "data"))

    @app.callback(
        Output("page", "children"),
        *[Output(f"to{path}", "className") for path in PAGES],
        Input("url", "pathname"),
        *watched,
    )
    def show(path: str | None, choice: Any, _: int, order: Any) -> tuple[Any, ...]:
        classes = ["here" if one == path else "" for one in PAGES]
        # Another table's order is nothing to a page that has no tables of its own.
        if ctx.triggered_id == "order" and path not in ("/", "/upkeep"):
            return no_update, *classes
        return _page(runs, path or "/", read(choice), read_order(order), ui), *classes

    @app.callback(
        Output("levels-body", "children"), Input("cost", "value"), State("choice", "data")
    )
    def show_levels(cost: Any, choice: Any) -> Part:
        return views.of_levels(runs.chosen(read(choice)), cost)

    @app.callback(
        Output("speed-body", "children"), Input("speed-run", "value"), Input("order", "data")
    )
    def show_speed(run_id: str, order: Any) -> Part:
        return _of_run(runs, run_id, lambda row: views.of_speed(row["run_id"], read_order(order)))

    @app.callback(
        Output("strategy", "options"),
        Output("strategy", "value"),
        Output("sample", "options"),
        Output("sample", "value"),
        Input("sample-run", "value"),
    )
    def offer_samples(run_id: str) -> tuple[Any, ...]:
        return _offer(runs, run_id)

    @app.callback(
        Output("sample-body", "children"),
        Input("strategy", "value"),
        Input("sample", "value"),
        State("sample-run", "value"),
    )
    def show_sample(strategy: str | None, sample: str | None, run_id: str) -> Part:
        if not strategy or not sample:
            return parts.empty("This benchmark keeps no answers.")
        return _of_run(runs, run_id, lambda row: views.of_sample(row, strategy, sample))

    @app.callback(
        Output("sweep-body", "children"), Input("sweep-run", "value"), Input("order", "data")
    )
    def show_sweep(run_id: str, order: Any) -> Part:
        return _of_run(runs, run_id, lambda row: views.of_sweep(row, read_order(order), ui))


def _page(runs: Archive, path: str, choice: Choice, order: Order, ui: str | None) -> Part:
    """A page, or the pickers of one whose body another callback fills."""
    frame = runs.chosen(choice)
    if path == "/":
        return views.at_a_glance(frame, order, ui)
    if path == "/upkeep":
        return views.of_upkeep(frame, query.num_bytes(frame), order, ui)
    if path == "/levels":
        costs = parts.picker("cost", "cost", COST_NAMES.items(), "num_parameters")
        return _with_body([costs], "levels-body")
    if path in ("/speed", "/sample"):
        found = _options(frame, "benchmark")
        if not found:
            return parts.empty("No benchmark among these runs: 'xsd benchmark' makes one.")
        name = path.removeprefix("/")
        fields = [parts.picker(f"{name}-run", "benchmark", found, found[0][0])]
        if path == "/sample":
            fields.append(parts.picker("strategy", "config", [], None))
            fields.append(parts.picker("sample", "sample", [], None))
        return _with_body(fields, f"{name}-body")
    if path == "/sweeps":
        found = _options(frame, "sweep")
        if not found:
            return parts.empty("No finished sweep among these runs: 'xsd sweep' makes one.")
        return _with_body([parts.picker("sweep-run", "sweep", found, found[0][0])], "sweep-body")
    return parts.empty("There is no such page.")


def _with_body(fields: list[Part], name: str) -> Part:
    return html.Div([html.Div(fields, className="pickers"), html.Div(id=name)])


def _options(frame: Any, stage: str) -> list[tuple[str, str]]:
    rows = frame[(frame["stage"] == stage) & (frame["status"] == "FINISHED")]
    return [(row["run_id"], views.title_of(row)) for row in rows.to_dict("records")]


def _of_run(runs: Archive, run_id: str | None, then: Any) -> Part:
    """Only runs of the archive are looked into, whatever a request names."""
    frame = runs.runs()
    rows = frame[frame["run_id"] == run_id].to_dict("records")
    return then(rows[0]) if rows else parts.empty("This run is gone.")


def _offer(runs: Archive, run_id: str | None) -> tuple[Any, ...]:
    from xsd.errors import XsdError

    if run_id not in set(runs.runs()["run_id"]):
        return [], None, [], None
    try:
        found = archive.bench(str(run_id))
    except XsdError:
        return [], None, [], None
    names = archive.drafting(found)
    samples = archive.samples(found)
    shown = [{"value": key, "label": f"{key}  {question}"} for key, question in samples]
    return list(names), (names[0] if names else None), shown, samples[0][0]


def written(choice: Choice) -> dict[str, Any]:
    """A choice as a browser keeps it."""
    return {
        "pair": choice.pair,
        "since": choice.since,
        "until": choice.until,
        "tags": list(choice.tags),
    }


def read(stored: dict[str, Any] | None) -> Choice:
    """The inverse of ``written``."""
    values = stored or {}
    return Choice(
        values.get("pair"), values.get("since"), values.get("until"), tuple(values.get("tags", ()))
    )


def read_order(stored: dict[str, Any] | None) -> Order:
    return Order(**stored) if stored else Order()


def to_search(choice: Choice) -> str:
    """A choice as the query of an address; empty for all."""
    words = {"pair": choice.pair, "since": choice.since, "until": choice.until}
    pairs = [(name, value) for name, value in words.items() if value]
    pairs += [("tag", tag) for tag in choice.tags]
    return f"?{urllib.parse.urlencode(pairs)}" if pairs else ""


def from_search(search: str) -> Choice:
    """The inverse of ``to_search``; what it does not know is left out."""
    found = urllib.parse.parse_qs(search.removeprefix("?"))
    first = {name: values[0] for name, values in found.items()}
    return Choice(
        first.get("pair"), first.get("since"), first.get("until"), tuple(found.get("tag", ()))
    )


def serve(host: str, port: int, ui: str | None = None) -> None:
    """Serve until interrupted.

    Raises:
        XsdError: the tracking store does not answer, or the port is taken.
    """
    from werkzeug.serving import make_server

    from xsd.errors import XsdError

    runs = Archive()
    number = len(runs.runs())
    try:
        server = make_server(host, port, build(runs, ui).server, threaded=True)
    except (OSError, SystemExit) as error:
        raise XsdError(f"port {port} of {host} is taken; choose another --port") from error
    print(f"dashboard of {number} runs: http://{host}:{server.port}/  (Ctrl-C ends it)")
    server.serve_forever()

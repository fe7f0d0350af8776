"""Callbacks, as a browser would call them, without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from dash import Dash

from dashboards.app import PAGES, build, from_search, serve, to_search
from dashboards.archive import Archive, Choice
from tests.dashboards.conftest import CLIP
from xsd.errors import XsdError

Filled = dict[str, str]
UI = "https://somebody:secret@mlflow.example.org/sub/"


@pytest.fixture
def app(filled: Filled) -> Dash:
    return build(Archive(), UI)


def fire(app: Dash, output: str, changed: str, **values: Any) -> dict[str, Any]:
    """Call the callback that has ``output``; ``values`` by component and property, ``__`` between.

    Returns component -> property -> value; what is not updated is missing.
    """
    key = next(name for name in app.callback_map if output in re.split(r"\.{2,3}", name))
    entry = app.callback_map[key]

    def given(items: list[dict[str, str]]) -> list[Any]:
        return [
            {**item, "value": values.get(f"{item['id']}__{item['property']}".replace("-", "_"))}
            for item in items
        ]

    names = [name for name in re.split(r"\.{2,3}", key) if name]
    outputs = [dict(zip(("id", "property"), name.rsplit(".", 1), strict=True)) for name in names]
    body = {
        "output": key,
        "outputs": outputs if key.startswith("..") else outputs[0],
        "inputs": given(entry["inputs"]),
        "state": given(entry["state"]),
        "changedPropIds": [changed],
    }
    answer = app.server.test_client().post("/_dash-update-component", json=body)
    assert answer.status_code in (200, 204), answer.get_data(as_text=True)
    found: dict[str, Any] = json.loads(answer.get_data() or b"{}").get("response", {})
    return found


def show(app: Dash, path: str, order: Any = None, **choice: Any) -> Any:
    stored = {"pair": None, "since": None, "until": None, "tags": [], **choice}
    values = {
        "url__pathname": path,
        "choice__data": stored,
        "version__data": 0,
        "order__data": order,
    }
    return fire(app, "page.children", "url.pathname", **values)["page"]["children"]


def nodes(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, list):
        for one in part:
            yield from nodes(one)
    elif isinstance(part, dict) and "props" in part:
        yield part
        yield from nodes(part["props"].get("children"))


def texts(part: Any) -> list[str]:
    """All that is to be read, in order."""
    if isinstance(part, str):
        return [part]
    if isinstance(part, list):
        return [text for one in part for text in texts(one)]
    return (
        texts(part["props"].get("children")) if isinstance(part, dict) and "props" in part else []
    )


def headings(part: Any) -> list[str]:
    return [texts(node)[0] for node in nodes(part) if node["type"] == "H2"]


def rows(part: Any) -> list[list[str]]:
    return [texts(node) for node in nodes(part) if node["type"] == "Tr"]


def test_overview(app: Dash, filled: Filled) -> None:
    page = show(app, "/", pair="tiny")
    assert headings(page) == [
        "Configs, measured", "Levels, offline", "Measured against modelled speedup",
    ]  # fmt: skip
    first = [row[0] for row in rows(page)]
    assert first.index("X1+E3") < first.index("vl_baseline") < first.index("levels"[:-1])
    assert {"L4", "E3"} <= set(first)
    [row] = [row for row in rows(page) if row[0] == "X1+E3"]
    titles = next(row for row in rows(page) if row[0].startswith("config"))
    samples = next(i for i, title in enumerate(titles) if title.startswith("samples"))
    assert row[samples] == "2"
    assert "no: 1 differ" in row and "1.43\N{MULTIPLICATION SIGN}" in row
    both = show(app, "/")
    assert "Measured speedup, benchmark by benchmark" in headings(both)


def test_names_lead_to_the_ui_without_its_password(app: Dash, filled: Filled) -> None:
    links = [node["props"]["href"] for node in nodes(show(app, "/")) if node["type"] == "A"]
    assert any(filled["E3"] in link for link in links)
    assert all(link.startswith("https://mlflow.example.org/sub/#/experiments/") for link in links)
    assert all(link.endswith("?workflowType=machine_learning") for link in links)


def test_a_heading_sorts_and_sorts_back(app: Dash) -> None:
    identity = '{"column":"total_ms","table":"configs","type":"sort"}'
    key = next(name for name in app.callback_map if name.startswith("order.data"))
    clicked = {"id": json.loads(identity), "property": "n_clicks", "value": 1}
    body = {"output": key, "outputs": {"id": "order", "property": "data"}, "inputs": [[clicked]]}
    body |= {"changedPropIds": [f"{identity}.n_clicks"]}
    client, order = app.server.test_client(), None
    for descending in (True, False):
        state = [{"id": "order", "property": "data", "value": order}]
        answer = client.post("/_dash-update-component", json={**body, "state": state})
        order = answer.get_json()["response"]["order"]["data"]
        assert order == {"table": "configs", "column": "total_ms", "descending": descending}
        names = [row[0] for row in rows(show(app, "/", order, pair="tiny"))]
        slowest, fastest = names.index("vl_baseline"), names.index("E3_decode")
        assert (slowest < fastest) is descending


@pytest.mark.parametrize("path", PAGES)
def test_what_nothing_is_chosen_for_says_so(app: Dash, path: str) -> None:
    said = " ".join(texts(show(app, path, pair="none")))
    if path == "/levels":  # its body is another callback's
        stored = {"pair": "none", "tags": []}
        body = fire(
            app,
            "levels-body.children",
            "cost.value",
            cost__value="num_parameters",
            choice__data=stored,
        )
        said = " ".join(texts(body["levels-body"]["children"]))
    assert said.startswith("No ")


def test_an_unknown_page(app: Dash) -> None:
    assert texts(show(app, "/../etc/passwd")) == ["There is no such page."]


@pytest.mark.parametrize("cost", ["num_parameters", "total_ms"])
def test_levels(app: Dash, cost: str) -> None:
    body = fire(app, "levels-body.children", "cost.value", cost__value=cost, choice__data={})
    assert headings(body["levels-body"]["children"]) == [
        "What acceptance costs",
        "Acceptance by answer position",
        "Features near the verifier's are not tokens accepted",
        "Training, by the metric that selects",
    ]


def test_speed(app: Dash, filled: Filled) -> None:
    body = fire(app, "speed-body.children", "speed-run.value", speed_run__value=filled["benchmark"])
    found = body["speed-body"]["children"]
    assert headings(found) == [
        "Measured speedup over plain decoding",
        "Where the time of an answer goes",
        "What the verifier accepted",
        "Accept rate by position",
        "Accept rate by position, in numbers",
        "Controls",
    ]
    assert [row[0] for row in rows(found)] == ["config", "E3_decode", "config", "drafter+VL"]
    assert rows(found)[1] == ["E3_decode", "decode", "50%", "50%", "0%"]


def test_one_answer(app: Dash, filled: Filled) -> None:
    offered = fire(
        app, "strategy.options", "sample-run.value", sample_run__value=filled["benchmark"]
    )
    assert offered["strategy"]["value"] == "X1+E3"
    assert offered["sample"]["value"] == f"{CLIP}/q0"
    body = fire(
        app,
        "sample-body.children",
        "sample.value",
        strategy__value="X1+E3",
        sample__value=f"{CLIP}/q0",
        sample_run__value=filled["benchmark"],
    )["sample-body"]["children"]
    assert headings(body) == ["The scene", "What prefill hides", "The answer"]
    assert len([node for node in nodes(body) if node["type"] == "Img"]) == 10
    marks = [
        n["props"]["className"] for n in nodes(body) if "token" in n["props"].get("className", "")
    ]
    assert marks[:6] == [
        f"token {o}" for o in ("gap", "gap", "verifier", "decode", "decode", "verifier")
    ]


def test_a_sweep(app: Dash, filled: Filled) -> None:
    body = fire(app, "sweep-body.children", "sweep-run.value", sweep_run__value=filled["sweep"])
    found = body["sweep-body"]["children"]
    assert headings(found) == [
        "Search history", "Accept length against latency", "Importance of the parameters",
        "What good trials share", "Trials",
    ]  # fmt: skip
    assert [row[0] for row in rows(found)] == ["trial", "0", "1", "2"]


def test_storage_and_failures(app: Dash, filled: Filled) -> None:
    found = show(app, "/upkeep")
    assert headings(found)[0] == "Failures"
    failed = [row for row in rows(found) if "FAILED" in row]
    assert failed[0][0] == "train L1" and failed[0][-1] == "the disk is full"
    assert any(row[0] == "benchmark" and row[3] == "1" for row in rows(found))
    assert any(row[0] == "scenes" and "kB" in row[1] for row in rows(found))


def test_a_run_that_no_request_may_name(app: Dash) -> None:
    for output, name in (("speed-body", "speed_run"), ("sweep-body", "sweep_run")):
        body = fire(app, f"{output}.children", "x.value", **{f"{name}__value": "../../etc"})
        assert texts(body[output]["children"]) == ["This run is gone."]


def test_a_choice_stands_in_the_address() -> None:
    choice = Choice("a pair", "2026-01-01", None, ("level=L4", "loss=token&x"))
    assert from_search(to_search(choice)) == choice
    assert to_search(Choice()) == "" and from_search("") == Choice()
    assert from_search("?nonsense=1&pair=tiny") == Choice("tiny")


def test_filters_and_address_move_each_other(app: Dash) -> None:
    moved = fire(app, "choice.data", "pair.value", pair__value="tiny", tags__value=["level=L4"])
    assert moved["url"]["search"] == "?pair=tiny&tag=level%3DL4" and "pair" not in moved
    opened = fire(app, "choice.data", "url.search", url__search="?pair=tiny&since=2026-01-02")
    assert opened["pair"]["value"] == "tiny" and opened["days"]["start_date"] == "2026-01-02"
    assert opened["choice"]["data"]["pair"] == "tiny" and "url" not in opened


def test_looking_again(app: Dash, filled: Filled) -> None:
    assert fire(app, "version.data", "clock.n_intervals", version__data=4) == {}
    asked = fire(app, "version.data", "again.n_clicks", again__n_clicks=1, version__data=4)
    assert asked["version"]["data"] == 5 and "tiny" in asked["pair"]["options"]


def test_it_needs_no_network(app: Dash) -> None:
    client = app.server.test_client()
    page = client.get("/").get_data(as_text=True)
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert loaded and all(not re.match(r"(https?:)?//", address) for address in loaded)
    assert any("plotly.min.js" in address for address in loaded) or "plotly" in page
    for address in loaded:
        assert client.get(address).status_code == 200, address


def test_a_port_that_is_taken(filled: Filled) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(XsdError, match="is taken"):
            serve("127.0.0.1", taken.getsockname()[1])


def test_it_opens_without_what_it_does_not_need() -> None:
    """Loading torch would take half of the time in which 1,000 runs are to be there."""
    heavy = "{'torch', 'transformers', 'optuna', 'numba'}"
    code = f"import sys, dashboards.app; print({heavy} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"

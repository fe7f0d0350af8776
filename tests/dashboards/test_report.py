from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from dashboards import page
from dashboards.report import Source, build, variant
from tests.test_plots import COUNTS, EXAMPLE, TRACES, trace
from xsd import speedup
from xsd.files import read_json, write_json

LEVELS = ("L4", "L4:feature", "E3", "B1")
MODELLED = {"modelled.speedup_e2e": 1.31}


class Page(HTMLParser):
    """Its headings, the rows of its tables, and whatever it would load from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self._where = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._where = tag
        if tag == "tr":
            self.rows.append([])
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self._where = ""

    def handle_data(self, data: str) -> None:
        if self._where in ("h1", "h2"):
            self.headings.append(data)
        if self._where in ("td", "th"):
            self.rows[-1].append(data)


def source(stage: str, name: str, folder: Path, **metrics: float) -> Source:
    return Source("0123456789abcdef", stage, name, {"level": name}, metrics, folder)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    traces = [*TRACES, trace("X1+E3@shuffled_events", "a", 90.0), trace("drafter+VL", "a", 95.0)]
    summary = json.loads(speedup.measured(traces).to_json(orient="records"))
    stored = {
        "summary": summary,
        "media_ms_mean": 3.2,
        "traces": [asdict(one) for one in traces],
    }
    write_json(tmp_path / "bench/e2e_wallclock_20260101_000000.json", stored)
    write_json(tmp_path / "bench/example.json", EXAMPLE.as_dict())
    found = [source("benchmark", "", tmp_path / "bench")]
    for name in LEVELS:
        folder = tmp_path / name
        write_json(folder / "position_stats.json", {"target": COUNTS.target.positions()})
        rates = {**COUNTS.rates(), **MODELLED, "num_parameters": 1234567.0, "accept_length": 2.5}
        rates["accept_90"] = 0.1 * len(found)
        if name == "B1":
            rates["same_position.accept_90"] = 0.61
        found.append(source("evaluate", name, folder, **rates))
        curve = pd.DataFrame({"step": [1, 2], "value": [1.0, 2.0]})
        found.append(Source("t" * 16, "train", name, {}, {}, folder, curve))
    both = {f"modelled.{k}_only_speedup": 1.1 for k in ("gap", "decode")}
    both |= {"phase1.accepted": 3.0, "modelled.tau": 2.0, **MODELLED}
    found.append(source("two_phase", "X1+E3", tmp_path, **both))
    refused = {"promoted": "false", "reasons": "2.0 does not beat <b>3.0</b>"}
    found.append(Source("p" * 16, "promote", "L4", refused, {"candidate": 2.0}, tmp_path))
    return found


def test_the_whole_page(sources: list[Source]) -> None:
    html = build(sources, "tiny", ["demo.yaml"])
    found = Page(html)
    assert found.headings == [
        "Cross-modal speculative decoding: tiny",
        "Configs, measured",
        "One answer, on the clock",
        "Levels, offline",
        "Controls",
        "Same position: leakage",
        "Two phases, modelled",
        "Champions",
    ]
    rows = {row[0]: row for row in found.rows}
    assert rows["X1+E3@shuffled_events"] and rows["E3"][6] == "2.50"
    assert [row[0] for row in found.rows if row[0] in LEVELS][:4] == [
        "L4",
        "L4:feature",
        "B1",
        "E3",
    ]
    assert len(re.findall('class="plotly-graph-div"', html)) == 8
    assert "a taste, not results" in html
    assert "&lt;b&gt;3.0&lt;/b&gt;" in html


def test_it_needs_no_network(sources: list[Source]) -> None:
    html = build(sources, "tiny")
    assert Page(html).loads == []
    assert "cdn.plot.ly" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert 'type="module"' not in html and "data:image/png" in html
    assert len(html) < 50 << 20
    assert "a taste, not results" not in html


def test_a_control_stands_beside_what_it_questions(sources: list[Source]) -> None:
    rows = Page(build(sources, "tiny")).rows
    start = next(i for i, row in enumerate(rows) if row[:2] == ["config", "accepted in the gap"])
    assert [row[0] for row in rows[start + 1 : start + 4]] == [
        "X1+E3",
        "X1+E3@shuffled_events",
        "drafter+VL",
    ]


def test_lossless_is_said_of_every_config(sources: list[Source]) -> None:
    rows = Page(build(sources, "tiny")).rows
    first = next(index for index, row in enumerate(rows) if row[-1] == "lossless")
    configs = {row[0]: row for row in rows[first:] if len(row) == len(rows[first])}
    assert configs["vl_baseline"][-1] == "yes"
    assert configs["X1+E3"][-1] == "no: 1 differ"


def test_acceptance_by_position_has_its_table(sources: list[Source]) -> None:
    few = Page(build(sources, "tiny")).rows
    assert ["config", "drafted in"] not in [row[:2] for row in few], "too few to tell a share"
    [path] = sources[0].folder.glob("e2e_wallclock_*.json")
    files = read_json(path)
    for one in files["traces"]:
        if one["strategy"] == "X1+E3":
            one |= {"cycle_drafted": [3] * 20, "cycle_accepted": [2, 0] * 10}
    write_json(path, files)
    rows = Page(build(sources, "tiny")).rows
    start = rows.index(["config", "drafted in", "1", "2", "3"])
    assert rows[start + 1] == ["X1+E3", "decode", "50%", "50%", "0%"]


@pytest.mark.parametrize("stage", ["benchmark", "evaluate", "promote"])
def test_what_is_missing_leaves_no_hole(sources: list[Source], stage: str) -> None:
    some = [one for one in sources if one.stage == stage]
    assert Page(build(some, "tiny")).headings[0].endswith("tiny")
    assert len(Page(build(some, "tiny")).headings) >= 2


def test_of_two_runs_the_later_counts(sources: list[Source], tmp_path: Path) -> None:
    write_json(tmp_path / "new/position_stats.json", {"target": COUNTS.target.positions()})
    rates = {**COUNTS.rates(), **MODELLED, "num_parameters": 1.0, "accept_length": 9.75}
    html = build([*sources, source("evaluate", "E3", tmp_path / "new", **rates)], "tiny")
    assert [row[6] for row in Page(html).rows if row[0] == "E3" and len(row) == 8] == ["9.75"]


@pytest.mark.parametrize(
    ("tags", "name"),
    [
        ({"level": "L4", "loss": "token", "conditioning": "teacher_forced"}, "L4"),
        ({"level": "L4", "loss": "feature"}, "L4:feature"),
        ({"level": "L4", "loss": "token", "conditioning": "free_running"}, "L4:free"),
        ({"level": "X1+E3"}, "X1+E3"),
        ({}, ""),
    ],
)
def test_variants(tags: dict[str, str], name: str) -> None:
    assert variant(tags) == name


def test_text_is_escaped() -> None:
    parts = [
        page.tiles({"<a>": "<b>"}),
        page.table(["<c>"], [["<d>"]]),
        page.section("<h>", page.paragraph("<p>")),
    ]
    text = "".join(parts)
    assert all(f"&lt;{name}&gt;" in text for name in "abcdhp")
    assert not any(f"<{name}>" in text for name in "abcdh")

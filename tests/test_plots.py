from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from xsd.adapters.catalog import LEVELS
from xsd.counts import Counts, PositionCounts
from xsd.decoding.config import AGAIN
from xsd.plots import clock, learning, offline, style, timeline
from xsd.speedup import Costs, measured
from xsd.types import EpochReport, Span, Trace


def trace(strategy: str, sample: str, total_ms: float, **changes: object) -> Trace:
    made = Trace(
        sample_key=sample,
        strategy=strategy,
        repeat=0,
        question="what is <this>?",
        token_ids=(5, 6, 7, 8, 9, 2),
        text="a road and a car",
        prefill_ms=40.0,
        decode_ms=total_ms - 42.0,
        total_ms=total_ms,
        num_free=0,
        gap_drafted=0,
        gap_accepted=0,
        cycle_drafted=(),
        cycle_accepted=(),
        first_difference=None,
        timeline=(
            Span("verifier", "prefill", 0.0, 40.0),
            Span("verifier", "decode", 40.0, total_ms),
        ),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


FAST = {
    "num_free": 3,
    "gap_drafted": 3,
    "gap_accepted": 2,
    "cycle_drafted": (4,),
    "cycle_accepted": (2,),
    "timeline": (
        Span("drafter", "prefill", 1.0, 10.0),
        Span("drafter", "draft", 10.0, 12.0),
        Span("drafter", "draft", 12.0, 14.0),
        Span("verifier", "prefill", 0.0, 40.0),
    ),
}
TRACES = [
    trace("vl_baseline", "a", 100.0),
    trace("vl_baseline", "b", 200.0),
    trace("X1+E3", "a", 50.0, **FAST),
    trace("X1+E3", "b", 160.0, **FAST, first_difference=2),
]
COSTS = Costs(10.0, 6.0, 1.0, 300.0, 90.0, {25: 22.0})
COUNTS = Counts(
    target=PositionCounts(
        num_samples=10,
        cos_sum=15.0,
        accepted=(18, 12, 6, 0),
        consecutive=(9, 8, 7, 0),
        top=(12, 16, 20),
        cos_histogram=(0,) * 30 + (5, 15) + (0,) * 8,
        scored=(10, 8, 2),
        cos_by_position=(8.0, 6.0, 1.0),
        accepted_90=(5, 1, 0),
        matched=(8, 3, 1),
        reached=(10, 7, 1),
        matched_reached=(8, 3, 0),
    ),
    prefix_histogram=(2, 5, 3) + (0,) * 20,
    cycles=(20,) * 8,
    emitted=(30,) * 8,
)
POSITIONS = COUNTS.target.positions()
MODELLED = {"modelled.speedup_e2e": 1.2, "modelled.bound_free_decode": 2.0, "modelled.tau": 3.0}
REPORTS = [
    EpochReport(
        epoch=epoch,
        step=10 * (epoch + 1),
        learning_rate=1e-3,
        train={"loss": 2.0 - epoch},
        val={"cos_sim_mean": 0.1 * epoch, "accepted_prefix_22": 1.0 + epoch % 2},
        is_best=epoch < 2,
        seconds=1.0,
    )
    for epoch in range(3)
]
EXAMPLE = timeline.Example(
    plain=TRACES[0],
    fast=TRACES[2],
    pieces=("a", " <b>", " c", " d", " e", "."),
    event_images=("data:image/png;base64,AA==",),
    frames=("data:image/png;base64,AA==",) * 2,
)
FIGURES: dict[str, Callable[[], go.Figure | None]] = {
    "speedup_comparison": lambda: clock.speedup_comparison(TRACES),
    "timing_breakdown": lambda: clock.timing_breakdown(TRACES),
    "accept_rate_comparison": lambda: clock.accept_rate_comparison(TRACES),
    "accept_rate_by_depth": lambda: clock.accept_rate_by_depth(TRACES * 10),
    "prefill_hiding": lambda: timeline.prefill_hiding(EXAMPLE, TRACES),
    "prefill_hiding_bare": lambda: timeline.prefill_hiding(
        replace(EXAMPLE, event_images=(), frames=()), TRACES
    ),
    "stage_timeline": lambda: timeline.stage_timeline(COSTS, 40, 8, 1.5),
    "metrics_summary": lambda: offline.metrics_summary("L4", COUNTS, MODELLED),
    "token_metrics": lambda: offline.token_metrics("L4", COUNTS),
    "acceptance_by_position": lambda: offline.acceptance_by_position(
        dict.fromkeys(("L4", "L4:feature", "E3"), COUNTS.target.positions())
    ),
    "feature_against_tokens": lambda: offline.feature_against_tokens(
        {"L4": COUNTS.rates(), "L1": COUNTS.rates() | {"accept_90": 0.1}}
    ),
    "training_curves": lambda: learning.training_curves("L4", REPORTS),
    "curves_comparison": lambda: learning.curves_comparison(
        {
            name: pd.DataFrame({"step": [1, 2], "value": [1.0, 2.0]})
            for name in ("L4", "L4:free", "E3")
        }
    ),
}


class TestFrames:
    def test_speedup(self) -> None:
        frame = clock.speedup_frame(TRACES)
        fast = frame[frame["strategy"] == "X1+E3"]
        assert fast["ratio"].tolist() == [2.0, 1.25] and set(fast["kind"]) == {"both"}

    def test_a_batch_is_one_dot(self) -> None:
        together = [replace(trace, batch="a", batch_size=2) for trace in TRACES]
        assert len(clock.speedup_frame(together)) == 2

    def test_what_rests_and_what_the_clock_is_worth_is_said(self) -> None:
        again = [replace(t, strategy=AGAIN, total_ms=1.25 * t.total_ms) for t in TRACES[:2]]
        summary = measured([*TRACES, *again])
        assert clock.noise(measured(TRACES)) == ""
        assert "0.800x, p5 to p95 0.80 to 0.80, and its time p95 of 1.25" in clock.noise(summary)
        resting = [replace(t, strategy="E1_decode") for t in TRACES[:2]]
        said = [
            a.text for a in clock.speedup_comparison([*TRACES, *resting, *again]).layout.annotations
        ]
        assert sum("drafting 0%" in text for text in said) == 1
        assert not any(row == "vl_baseline" for row in said) and len(said) == 3

    def test_acceptance_names_the_origin_of_every_token(self) -> None:
        frame = clock.acceptance_frame(TRACES)
        assert frame["strategy"].tolist() == ["X1+E3"]
        row = frame.iloc[0]
        assert row["accept_rate"] == pytest.approx(4 / 7)
        assert (row["gap"], row["decode"], row["verifier"]) == (2, 2, 2)

    def test_a_rate_of_few_answers_is_pale_and_says_so(self) -> None:
        rare = [*TRACES, trace("E1_decode", "a", 90.0, cycle_drafted=(4,), cycle_accepted=(3,))]
        made = clock.accept_rate_comparison([*rare, trace("E1_decode", "b", 190.0)])
        said = [a.text.strip() for a in made.layout.annotations if "drafting" in a.text]
        assert said == ["drafting 50%"]
        dots = {d.y[0]: d.marker.opacity[0] for d in made.data if d.marker.opacity is not None}
        assert dots["E1_decode"] < dots["X1+E3"] == 1
        legends = {(d.legend or "legend", d.name) for d in made.data if d.showlegend is not False}
        assert {("legend", "both"), ("legend", "drafts in decode")} < legends
        assert ("legend2", "verifier") in legends

    def test_acceptance_by_depth_counts_what_was_verified(self) -> None:
        cycles = {"cycle_drafted": (3, 2, 3), "cycle_accepted": (3, 0, 1)}
        gap = {"gap_drafted": 3, "gap_accepted": 2}
        frame = clock.depth_frame(
            [
                trace("vl_baseline", "a", 9.0),
                trace("X1+E3", "a", 9.0, **cycles, **gap),
                # The first of five was refused: nobody looked at the others.
                trace("X1+E3", "b", 9.0, gap_drafted=5),
                # A tree of three tokens, of which no more than two follow each other.
                trace("E1_tree", "a", 9.0, cycle_drafted=(3, 3), cycle_accepted=(2, 0)),
            ]
        )
        found = {
            key: list(zip(rows["depth"], rows["accepted"], rows["verified"], strict=True))
            for key, rows in frame.groupby(["strategy", "phase"])
        }
        assert found == {
            ("X1+E3", "gap"): [(1, 1, 2), (2, 1, 1), (3, 0, 1)],
            ("X1+E3", "decode"): [(1, 2, 3), (2, 1, 3), (3, 1, 2)],
            ("E1_tree", "decode"): [(1, 1, 2), (2, 1, 2)],
        }

    def test_lines_of_acceptance_by_depth(self) -> None:
        made = clock.accept_rate_by_depth(TRACES * 10)
        lines = [(line.yaxis, *line.x, *line.y) for line in made.data]
        # The gap's first, what is behind it, and four drafts a cycle of which two held.
        assert lines == [("y", 1, 1), ("y", 2, 3, 1, 0), ("y2", 1, 2, 3, 4, 1, 1, 0, 0)]
        assert [a.text for a in made.layout.annotations].count("X1+E3") == 2
        table = clock.depth_table(TRACES * 10)
        assert table.columns.tolist() == ["phase", "strategy", "1", "2", "3", "4"]
        assert table.iloc[0].tolist()[:5] == ["gap", "X1+E3", 1, 1, 0]
        assert table.iloc[1].tolist() == ["decode", "X1+E3", 1, 1, 0, 0]
        assert clock.depth_table(TRACES).empty
        # A first draft, refused: of the gap there is one share, which is no curve.
        lone = clock.accept_rate_by_depth([replace(t, gap_accepted=0) for t in TRACES * 10])
        assert [(line.yaxis, *line.x) for line in lone.data] == [("y", 1, 2, 3, 4)]
        bare = clock.accept_rate_by_depth(TRACES[:2])
        assert not bare.data and "no config had 20" in bare.layout.annotations[-1].text

    def test_histogram(self) -> None:
        frame = offline.histogram_frame(COUNTS.target)
        assert frame["share"].sum() == pytest.approx(1)
        assert frame["cos_sim"].iloc[[0, -1]].tolist() == pytest.approx([-0.975, 0.975])

    def test_positions_of_few_answers_are_blank(self) -> None:
        frame = offline.position_frame({"L4": COUNTS.target.positions()})
        assert frame["match"].tolist()[:2] == pytest.approx([0.8, 3 / 8])
        assert math.isnan(frame["match"][2])
        assert frame["match_given_prefix"].tolist()[:2] == pytest.approx([0.8, 3 / 7])

    def test_positions_of_many_answers_need_twenty(self) -> None:
        rows = [{**row, "num": num} for row, num in zip(POSITIONS, (20, 20, 19), strict=True)]
        frame = offline.position_frame({"L4": rows, "L1": POSITIONS})
        blank = frame["match"].isna().groupby(frame["level"], sort=False).agg(list)
        assert blank.to_dict() == {"L4": [False, False, True], "L1": [False, False, True]}

    def test_features_that_do_not_differ_rank_nothing(self) -> None:
        same, other = COUNTS.rates(), COUNTS.rates() | {"accept_90": 0.1}
        assert offline.feature_against_tokens({"L4": same, "L1": same}) is None
        made = offline.feature_against_tokens({"L4": same, "L1": other, "E1": same, "E3": same})
        assert made is not None and len(made.data) == 1

    def test_consecutive(self) -> None:
        frame = offline.consecutive_frame(COUNTS).set_index("what")["num"]
        assert frame["cos > 0.90"] == 0.7 and frame["tokens"] == pytest.approx(1.1)

    def test_modelled_only(self) -> None:
        assert offline.speedup_frame(MODELLED)["speedup"].tolist() == [1.2, 2.0]

    def test_selection_metric_is_the_levels_own(self) -> None:
        frame = offline.selection_frame({"L4": COUNTS.rates(), "E3": COUNTS.rates()})
        assert frame["accept_length"].tolist() == pytest.approx([1.1, 1.5])
        assert frame["phase"].tolist() == ["gap", "decode"]

    def test_training(self) -> None:
        frame = learning.training_frame(REPORTS)
        assert len(frame) == 9
        assert frame[frame["split"] == "train"]["value"].tolist() == [2, 1, 0]

    def test_stages(self) -> None:
        frame = timeline.stage_frame(COSTS, 40, 8, 2.0)
        ends = frame.groupby("lane")["end_ms"].max()
        assert ends["plain<br>verifier"] == COSTS.plain_ms(40)
        assert ends["speculative<br>verifier"] == COSTS.gap_ms(40, COSTS.num_free(40), 8, 2.0)
        assert ends["speculative<br>drafter"] == 90 + 30 * 7
        missed = timeline.stage_frame(COSTS, 40, 0, 1.0)
        assert "verify" not in set(missed["what"]) and "draft" in set(missed["what"])
        head = timeline.stage_frame(COSTS, 40, None, 2.0)
        assert set(head["phase"]) == {"prefill", "decode"}
        assert head["end_ms"].max() == COSTS.plain_ms(40)
        assert head["end_ms"].iloc[-1] == pytest.approx(300 + 39 * 5)

    def test_neighbours_of_a_kind_are_one_bar(self) -> None:
        frame = timeline.lanes_frame([EXAMPLE.fast])
        draft = frame[frame["what"] == "draft"].iloc[0]
        assert (draft["start_ms"], draft["end_ms"], draft["count"]) == (10, 14, 2)


class TestExample:
    @pytest.mark.parametrize(
        ("changes", "origins"),
        [
            ({}, "vvvvvv"),
            ({"gap_drafted": 3, "gap_accepted": 2}, "ggvvvv"),
            ({"gap_drafted": 1, "gap_accepted": 1}, "gvvvvv"),
            ({"gap_drafted": 9, "gap_accepted": 6}, "gggggg"),
            ({"cycle_drafted": (4, 4), "cycle_accepted": (1, 3)}, "vdvddd"),
            (FAST, "ggvddv"),
        ],
    )
    def test_whose_token_is_whose(self, changes: dict[str, object], origins: str) -> None:
        found = timeline.token_origins(trace("X1+E3", "a", 50.0, **changes))
        assert "".join(origin[0] for origin in found) == origins

    def test_why_it_was_picked_and_what_is_usual_is_said(self) -> None:
        resting = [
            trace("vl_baseline", "c", 100.0),
            trace("X1+E3", "c", 100.0),
            trace("vl_baseline", "d", 20.0),
            trace("X1+E3", "d", 20.0),
        ]
        said = timeline.prefill_hiding(EXAMPLE, [*TRACES, *resting]).layout.title.subtitle.text
        # Of four answers two had drafts in the gap; 420 ms in all became 330.
        assert "one sample: 100 ms become 50 ms (2.00" in said
        assert "leaves the gap off in 50.0% of this config's answers (1.27" in said
        assert "policy" not in timeline.prefill_hiding(EXAMPLE, TRACES).layout.title.subtitle.text

    @pytest.mark.parametrize(
        ("plain_ms", "fast_ms", "text"),
        [
            (100.0, 50.0, "100 ms become 50 ms (2.00"),
            (10.7, 11.2, "10.7 ms become 11.2 ms (0.96"),
            (100.4, 99.6, "100.4 ms become 99.6 ms (1.01"),
        ],
    )
    def test_times_are_told_apart(self, plain_ms: float, fast_ms: float, text: str) -> None:
        pair = replace(
            EXAMPLE, plain=trace("vl_baseline", "a", plain_ms), fast=trace("L4+VL", "a", fast_ms)
        )
        assert timeline.lanes(pair).layout.title.subtitle.text.startswith(text)

    def test_text_is_escaped_and_marked(self) -> None:
        html = timeline.answer_html(EXAMPLE)
        assert "&lt;b&gt;" in html and "<b> c" not in html
        assert html.count(style.BLUE) == 2 and html.count(style.ORANGE) == 2

    def test_the_end_is_a_sign(self) -> None:
        html = timeline.answer_html(replace(EXAMPLE, pieces=(" a", " b", "</s>")))
        assert "&lt;/s&gt;" not in html and html.endswith("\N{END OF PROOF}")
        assert ">a<" in html and "> b<" in html

    def test_through_json(self) -> None:
        assert timeline.Example.from_dict(json.loads(json.dumps(EXAMPLE.as_dict()))) == EXAMPLE

    def test_trace_through_json(self) -> None:
        for made in TRACES:
            assert timeline.trace_from(json.loads(json.dumps(asdict(made)))) == made

    def test_data_uri_is_a_small_png(self) -> None:
        image = np.zeros((300, 600, 3), np.uint8)
        head, _, body = timeline.data_uri(image, size=50).partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(body))).size == (50, 25)


@pytest.mark.parametrize("name", FIGURES)
class TestFigures:
    def test_is_titled_sized_and_serialises(self, name: str) -> None:
        made = FIGURES[name]()
        assert made is not None
        assert made.layout.title.text and made.layout.width == 960 and made.layout.height >= 220
        assert made.layout.paper_bgcolor is None  # the template's transparent one
        assert json.loads(made.to_json())["data"]

    def test_axes_name_their_unit(self, name: str) -> None:
        made = FIGURES[name]()
        assert made is not None
        text = made.to_json()
        units = ("milliseconds", "position", "plain ", "tokens", "step", "accept@0.90")
        assert any(unit in text for unit in units)


def test_every_level_has_a_colour() -> None:
    assert set(style.LEVEL_COLOURS) == set(LEVELS)
    for phase in ("gap", "decode"):
        colours = [style.LEVEL_COLOURS[n] for n, row in LEVELS.items() if row.phase == phase]
        assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vl_baseline", "plain"),
        ("L4+VL", "gap"),
        ("L4+VL:free", "gap"),
        ("E3_decode", "decode"),
        ("X1+E3", "both"),
        ("drafter+VL", "control"),
        ("template+VL", "control"),
        ("text", "control"),
        ("X1+text", "control"),
        ("X1+E3@shuffled_events", "control"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert style.kind(name) == kind


def test_labels_that_would_touch_move_apart() -> None:
    made = style.panels("t", "s", ["a"], columns=1)
    made.add_scatter(x=[0, 1], y=[0.0, 10.0], row=1, col=1)
    style.end_labels(made, ["L1", "L2"], [1, 1], [5.0, 5.01], row=1, column=1)
    low, high = (made.layout.annotations[i].yshift for i in (1, 2))
    assert 14 < high - low < 16 and low + high == pytest.approx(0, abs=0.1)


def test_labels_that_cannot_touch_stay_at_their_points() -> None:
    made = style.panels("t", "s", ["a"], columns=1)
    made.add_scatter(x=[0, 1], y=[0.0, 10.0], row=1, col=1)
    style.end_labels(made, ["L1", "L2", "L3"], [0.5, 1, 1], [5.0, 5.0, 9.0], row=1, column=1)
    assert [a.yshift for a in made.layout.annotations[1:]] == pytest.approx([0, 0, 0])


def test_a_label_moves_off_the_line_that_goes_on_behind_it() -> None:
    made = style.panels("t", "s", ["a"], columns=1)
    for x, y in (([0, 5], [0.0, 5.0]), ([0, 10], [5.1, 5.1]), ([0, 10], [0.0, 10.0])):
        made.add_scatter(x=x, y=y, mode="lines", row=1, col=1)
    style.end_labels(made, ["L1", "L2"], [5, 10], [5.0, 5.1], row=1, column=1)
    moved, stays = (a.yshift for a in made.layout.annotations[1:])
    assert (moved, stays) == pytest.approx((-7.5, 0))


@pytest.mark.parametrize(
    ("heights", "places"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([2, 2, 2], [1, 2, 3]),
        ([0, 5, 5.5], [0, 4.75, 5.75]),
        ([9, 9.5], [8, 9]),
    ],
)
def test_as_little_as_keeps_labels_apart(heights: list[float], places: list[float]) -> None:
    assert style._apart(heights, 1.0, 9.0) == pytest.approx(places)


def test_labels_of_a_level_that_never_matched() -> None:
    rows = [{**row, "match": 0.0, "match_given_prefix": 0.0} for row in COUNTS.target.positions()]
    assert offline.acceptance_by_position({"L1": rows}).layout.annotations

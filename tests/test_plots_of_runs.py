"""Frames and figures over many runs: leaderboards, costs, agreement, storage, failures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from xsd.decoding.strategies import metric_name
from xsd.plots import overview, upkeep


def run(stage: str, day: int, tags: dict[str, str] | None = None, **values: Any) -> dict[str, Any]:
    return {
        "run_id": f"{stage}-{day}",
        "experiment_id": "1",
        "name": stage,
        "stage": stage,
        "status": "FINISHED",
        "started": pd.Timestamp(f"2026-01-{day:02d} 10:00", tz="UTC"),
        "tags": tags or {},
        **values,
    }


def measured(**speedups: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for config, speedup in speedups.items():
        prefix = f"measured.{metric_name(config)}"
        found |= {f"{prefix}.speedup": speedup, f"{prefix}.total_ms": 100 / speedup}
        found |= {f"{prefix}.num_different": 1.0, f"{prefix}.num_near_ties": float(speedup > 1)}
    return found


CONFIGS = {"cfg.configs": "L4+VL,X1+E3", "cfg.control": "null"}
BENCHES = [
    run("benchmark", 1, **CONFIGS, **measured(**{"vl_baseline": 1.0, "L4+VL": 0.8, "X1+E3": 1.4})),
    run("benchmark", 3, **{"cfg.configs": "L4+VL"}, **measured(**{"L4+VL": 1.2})),
    run("benchmark", 4, **{"cfg.configs": "no such config"}),
]


def evaluated(day: int, level: str, length: float, parameters: float) -> dict[str, Any]:
    values = {"accept_length": length, "num_parameters": parameters, "modelled.speedup_e2e": length}
    return run("evaluate", day, {"level": level, "loss": "token"}, **values)


EVALUATIONS = [
    evaluated(1, "L4", 1.0, 10.0),
    evaluated(2, "L4", 1.1, 10.0),
    evaluated(2, "L1", 0.5, 20.0),
    evaluated(2, "X1", 3.0, 30.0),
    evaluated(2, "E3", 5.0, 40.0),
]
BOTH = run("two_phase", 2, {"level": "X1+E3"}, **{"modelled.speedup_e2e": 2.0})
RUNS = pd.DataFrame([*BENCHES, *EVALUATIONS, BOTH])


def test_configs_have_their_own_names_again() -> None:
    frame = overview.configs_frame(RUNS).set_index(["run_id", "strategy"])
    assert frame.loc[("benchmark-1", "X1+E3"), "speedup"] == 1.4
    assert frame.loc[("benchmark-1", "X1+E3"), "kind"] == "both"
    assert list(frame["lossless"]) == [False, False, True, True]
    assert np.isnan(frame["tau"]).all() and len(frame) == 4


def test_what_was_modelled_stands_beside_what_was_measured() -> None:
    runs = RUNS.assign(**{f"modelled.{metric_name('X1+E3')}.speedup": 1.7})
    frame = overview.configs_frame(runs).set_index("strategy")
    assert (frame.loc[["X1+E3"], "modelled_speedup"] == 1.7).all()
    assert frame.loc[["L4+VL"], "modelled_speedup"].isna().all()


def test_the_newest_of_a_name_counts() -> None:
    frame = overview.newest(overview.configs_frame(RUNS), "strategy").set_index("strategy")
    assert frame.loc["L4+VL", "speedup"] == 1.2 and frame.loc["X1+E3", "speedup"] == 1.4
    levels = overview.newest(overview.levels_frame(RUNS), "level").set_index("level")
    assert levels.loc["L4", "accept_length"] == 1.1 and len(levels) == 4


def test_the_front_is_what_nothing_beats_in_both() -> None:
    levels = overview.newest(overview.levels_frame(RUNS), "level")
    frame = overview.cost_frame(levels, overview.configs_frame(RUNS), "num_parameters")
    assert dict(zip(frame["level"], frame["on_front"], strict=True)) == {
        "L4": True, "L1": False, "X1": True, "E3": True,
    }  # fmt: skip
    timed = overview.cost_frame(levels, overview.configs_frame(RUNS), "total_ms")
    assert timed["level"].tolist() == ["L4"] and timed["cost"].tolist() == pytest.approx(
        [100 / 1.2]
    )


def test_a_config_agrees_with_the_model_of_its_own_levels() -> None:
    frame = overview.agreement_frame(overview.configs_frame(RUNS), RUNS).set_index("strategy")
    assert frame.loc["L4+VL", ["measured", "modelled"]].tolist() == [1.2, 1.1]
    assert frame.loc["X1+E3", ["measured", "modelled"]].tolist() == [1.4, 2.0]
    assert len(frame) == 2


@pytest.mark.parametrize("stage", ["benchmark", "evaluate", "none"])
def test_frames_of_what_is_not_there(stage: str) -> None:
    some = RUNS[RUNS["stage"] == stage]
    configs, levels = overview.configs_frame(some), overview.levels_frame(some)
    assert (configs.empty, levels.empty) == (stage != "benchmark", stage != "evaluate")
    assert overview.agreement_frame(configs, some).empty
    assert overview.cost_frame(levels, configs, "total_ms").empty


FAILED = pd.DataFrame(
    [
        run("train", 1) | {"status": "FAILED", "tags": {"xsd.error": "full"}},
        run("train", 2) | {"status": "KILLED"},
        run("extract", 2, num_failures=3.0),
        run("benchmark", 3, {"num_failures": "2"}),
        run("benchmark", 3, {"num_failures": "0"}),
    ]
)


def test_failures_of_runs_and_of_samples() -> None:
    frame = upkeep.failures_frame(FAILED)
    assert frame["name"].tolist() == ["benchmark", "train", "extract", "train"]
    assert frame["num_failures"].tolist() == [2, 0, 3, 0] and frame["reason"].iloc[-1] == "full"


def test_storage_adds_up_and_says_what_it_does_not_know() -> None:
    weights = pd.Series([5.0, np.nan, 100.0, 1.0, 2.0])
    frame = upkeep.storage_frame(FAILED, weights).set_index("stage")
    assert frame["num_bytes"].to_dict() == {"extract": 100, "train": 5, "benchmark": 3}
    assert frame.loc["train", ["num_runs", "num_unknown"]].tolist() == [2, 1]


def test_outcomes_are_counted_by_day() -> None:
    frame = upkeep.outcomes_frame(FAILED)
    assert frame["num"].sum() == 5
    assert frame[frame["status"] == "FINISHED"]["num"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (9_997_000, "10 MB"), (5.3e14, "530 TB")],
)
def test_sizes_in_words(num_bytes: float, text: str) -> None:
    assert upkeep.size_text(num_bytes) == text


def test_figures_are_titled_and_name_their_unit() -> None:
    configs, levels = overview.configs_frame(RUNS), overview.levels_frame(RUNS)
    made = {
        "parameters": overview.cost_against_acceptance(
            overview.cost_frame(levels, configs, "num_parameters"), "num_parameters"
        ),
        "speedup over plain": overview.agreement(overview.agreement_frame(configs, RUNS)),
        "measured speedup": overview.progress(configs),
        "bytes": upkeep.storage(upkeep.storage_frame(FAILED, pd.Series([1.0] * 5))),
        "runs": upkeep.outcomes(upkeep.outcomes_frame(FAILED)),
    }
    for unit, one in made.items():
        assert one.layout.title.text and unit in one.to_json()

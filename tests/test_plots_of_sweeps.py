"""Figures of a search, from frames as ``search.study`` makes them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from xsd.plots import sweep

NAN = float("nan")


@pytest.fixture
def trials() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "number": [0, 1, 2, 3, 4],
            "state": ["complete", "pruned", "complete", "failed", "complete"],
            "accept_length": [1.0, 0.4, 3.0, NAN, 2.0],
            "latency_ms": [0.2, NAN, 0.9, NAN, 0.3],
            "num_epochs": [3, 1, 3, 0, 3],
            "on_front": [True, False, True, False, False],
            "learning_rate": [1e-4, 1e-3, 1e-2, 1e-3, 1e-3],
            "dropout": [0.0, 0.1, 0.2, 0.3, 0.3],
            "loss": ["token", "feature", "token", "token", "feature"],
        }
    )


def test_history_shows_each_trial_by_its_state_and_the_best_so_far(trials: pd.DataFrame) -> None:
    drawn = {trace.name: trace for trace in sweep.history(trials).data}
    assert list(drawn) == ["complete", "pruned", "best so far"]
    assert list(drawn["complete"].x) == [0, 2, 4] and list(drawn["pruned"].y) == [0.4]
    assert list(drawn["best so far"].y) == [1.0, 3.0, 3.0], "a pruned trial never leads"
    assert list(drawn["complete"].customdata) == [3, 3, 3]


def test_the_front_is_drawn_in_the_order_of_latency(trials: pd.DataFrame) -> None:
    dominated, front = sweep.pareto(trials.iloc[::-1]).data
    assert list(front.customdata) == [0, 2] and list(front.x) == [0.2, 0.9]
    assert list(dominated.customdata) == [4]


def test_the_weightiest_parameter_is_on_top() -> None:
    shares = pd.DataFrame(
        {
            "objective": ["accept_length"] * 2 + ["latency_ms"] * 2,
            "parameter": ["dropout", "ffn_dim"] * 2,
            "importance": [0.6, 0.4, 0.1, 0.9],
        }
    )
    made = sweep.importance(shares)
    # Plotly counts a category axis from below.
    assert list(made.layout.yaxis.categoryarray) == ["dropout", "ffn_dim"]
    assert [trace.name for trace in made.data] == list(sweep.OBJECTIVE_NAMES.values())
    assert list(made.data[1].x) == [0.1, 0.9]


def test_parallel_coordinates_spread_decades_and_number_choices(trials: pd.DataFrame) -> None:
    named = ["learning_rate", "dropout", "loss", "not_in_this_study"]
    [drawn] = sweep.parallel_coordinates(trials, named).data
    axes = {axis.label: axis for axis in drawn.dimensions}
    assert list(axes) == ["learning_rate", "dropout", "loss", "accept length", "latency, ms"]
    assert list(axes["learning_rate"].values) == pytest.approx([-4, -2, -3])
    assert axes["learning_rate"].ticktext[0] == "0.0001"
    assert list(axes["dropout"].values) == [0.0, 0.2, 0.3] and axes["dropout"].ticktext is None
    ticks = dict(zip(axes["loss"].tickvals, axes["loss"].ticktext, strict=True))
    assert [ticks[code] for code in axes["loss"].values] == ["token", "token", "feature"]
    assert np.array_equal(drawn.line.color, [1.0, 3.0, 2.0])


def test_a_parameter_that_some_trials_lack_is_left_out(trials: pd.DataFrame) -> None:
    trials.loc[4, "dropout"] = NAN
    [drawn] = sweep.parallel_coordinates(trials, ["dropout"]).data
    assert "dropout" not in [axis.label for axis in drawn.dimensions]

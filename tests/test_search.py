from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from xsd.errors import XsdError
from xsd.search import Params, TrialReport, best_trial, open_study, read_space, run_trials
from xsd.search_config import SearchConfig
from xsd.types import EpochReport

SPACE = """
learning_rate: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}
num_layers: {type: int, low: 1, high: 3}
loss: {type: categorical, choices: [token, feature]}
"""
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NAMES = ("learning_rate", "num_layers", "loss")


def report(epoch: int, value: float) -> EpochReport:
    return EpochReport(
        epoch=epoch,
        step=10 * (epoch + 1),
        learning_rate=1e-3,
        train={"loss": 1.0},
        val={"tau_6": value},
        is_best=True,
        seconds=0.0,
    )


class Objective:
    """A trial is worth its number of layers, reached linearly; it notes how it was left."""

    def __init__(self, num_epochs: int = 6) -> None:
        self.num_epochs = num_epochs
        self.asked: list[Params] = []
        self.left: list[int] = []

    def __call__(self, number: int, params: Params) -> Generator[EpochReport, None, None]:
        self.asked.append(params)
        try:
            for epoch in range(self.num_epochs):
                worth = params["num_layers"] * (epoch + 1) / self.num_epochs
                yield report(epoch, worth)
        except GeneratorExit:
            self.left.append(number)
            raise


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def search(
    tmp_path: Path, objective: Any, *, num_trials: int = 8, **options: Any
) -> tuple[list[TrialReport], Any]:
    (tmp_path / "space.yaml").write_text(SPACE)
    space = read_space(tmp_path / "space.yaml", NAMES)
    config = SearchConfig(num_trials=num_trials, num_startup_trials=2, **options)
    study = open_study(tmp_path / "study.log", "tiny-L4", config, seed=0, num_epochs=6)
    return list(run_trials(objective, study, space, metric="tau_6", num_trials=num_trials)), study


def test_space_is_read(space_file: Path) -> None:
    space = read_space(space_file, NAMES)
    assert list(space) == list(NAMES)
    assert space["learning_rate"].log  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth: {type: int, low: 1, high: 2}", "depth"),
        ("num_layers: {type: whole, low: 1, high: 2}", "float, int, categorical"),
        ("num_layers: 3", "float, int, categorical"),
        ("num_layers: {type: int, low: 3, high: 1}", "num_layers"),
        ("num_layers: {type: int, lo: 3, high: 1}", "num_layers"),
        ("loss: {type: categorical, choices: []}", "loss"),
        ("- a", "maps names"),
        ("{", "YAML"),
        ("", "maps names"),
    ],
)
def test_bad_space_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(XsdError, match=message):
        read_space(path, NAMES)


def test_missing_space(tmp_path: Path) -> None:
    with pytest.raises(XsdError, match="--space"):
        read_space(tmp_path / "none.yaml", NAMES)


def test_every_trial_is_reported_and_the_best_is_known(tmp_path: Path) -> None:
    reports, study = search(tmp_path, Objective(), pruner="none")
    assert [one.number for one in reports] == list(range(8))
    assert {one.state for one in reports} == {"complete"}
    assert all(one.num_epochs == 6 and one.value == one.params["num_layers"] for one in reports)
    number, params, value = best_trial(study)
    assert value == 3 and params["num_layers"] == 3
    assert [one.number for one in reports if one.is_best][-1] == number


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_pruning_is_ceasing_to_pull(tmp_path: Path, pruner: str) -> None:
    objective = Objective(num_epochs=9)
    reports, _ = search(tmp_path, objective, num_trials=14, pruner=pruner)
    pruned = [one for one in reports if one.state == "pruned"]
    assert pruned and all(one.num_epochs < 9 for one in pruned)
    assert objective.left == [one.number for one in pruned]
    assert not any(one.is_best for one in pruned)


def test_same_seed_same_trials(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, _ = search(tmp_path / "a", Objective())
    second, _ = search(tmp_path / "b", Objective())
    assert [one.params for one in first] == [one.params for one in second]


def test_resumes_where_it_was_killed(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def dies(number: int, params: Params) -> Generator[EpochReport, None, None]:
        if number == 3:
            raise Killed
        yield report(0, 1.0)

    with pytest.raises(Killed):
        search(tmp_path, dies, pruner="none")
    objective = Objective()
    reports, study = search(tmp_path, objective, pruner="none")
    assert len(reports) == 5 and reports[0].number == 4
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 5
    assert search(tmp_path, objective, pruner="none")[0] == []


def test_a_trial_left_running_is_told_failed(tmp_path: Path) -> None:
    _, study = search(tmp_path, Objective(), num_trials=1)
    study.ask()
    reports, study = search(tmp_path, Objective(), num_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert len(reports) == 1


def test_a_diverging_trial_fails_alone(tmp_path: Path) -> None:
    def diverges(number: int, params: Params) -> Generator[EpochReport, None, None]:
        yield report(0, 1.0)
        if number == 1:
            raise XsdError("the loss became nan")

    reports, study = search(tmp_path, diverges, num_trials=3, pruner="none")
    assert [one.state for one in reports] == ["complete", "failed", "complete"]
    assert "nan" in reports[1].reason
    assert best_trial(study)[2] == 1.0


def test_no_trial_completed(tmp_path: Path) -> None:
    def silent(number: int, params: Params) -> Generator[EpochReport, None, None]:
        yield from ()

    reports, study = search(tmp_path, silent, num_trials=2)
    assert [one.state for one in reports] == ["failed", "failed"]
    with pytest.raises(XsdError, match="no trial"):
        best_trial(study)


@pytest.mark.parametrize("options", [{"num_trials": 0}, {"num_startup_trials": -1}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(XsdError, match=next(iter(options))):
        SearchConfig(**options)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("sweep*.yaml")), ids=lambda p: p.name)
def test_shipped_spaces_are_options_of_training(path: Path) -> None:
    from dataclasses import fields

    from xsd.adapters.config import AdapterSizes
    from xsd.learning.config import FitConfig

    names = [field.name for kind in (AdapterSizes, FitConfig) for field in fields(kind)]
    assert read_space(path, names)

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest

from tests.search.conftest import CLAIMS, SPACE, Epochs, Objective, opened, report, search
from xsd.errors import XsdError
from xsd.search.space import read_space
from xsd.search.study import candidate, counted, state_of
from xsd.search.trials import Trial, run_trials

ROOT = Path(__file__).parents[2]


def test_every_trial_is_reported_and_the_best_is_known(tmp_path: Path) -> None:
    reports, study = search(tmp_path, Objective(), pruner="none")
    assert [one.number for one in reports] == list(range(8))
    assert {one.state for one in reports} == {"complete"}
    assert all(
        one.num_epochs == 6 and one.accept_length == one.params["num_layers"] for one in reports
    )
    best = candidate(study)
    assert best.accept_length == 3 and best.params["num_layers"] == 3


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_pruning_is_ceasing_to_pull(tmp_path: Path, pruner: str) -> None:
    objective = Objective(num_epochs=9)
    reports, _ = search(tmp_path, objective, num_trials=20, pruner=pruner)
    pruned = [one for one in reports if one.state == "pruned"]
    assert pruned and all(one.num_epochs < 9 for one in pruned)
    assert objective.left == [one.number for one in pruned]


def test_same_seed_same_trials(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, _ = search(tmp_path / "a", Objective())
    second, _ = search(tmp_path / "b", Objective())
    assert [one.params for one in first] == [one.params for one in second]


def test_resumes_where_it_was_killed(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def dies(trial: Trial) -> Epochs:
        if trial.number == 3:
            raise Killed
        yield report(0, 1.0)
        return {}

    with pytest.raises(Killed):
        search(tmp_path, dies, pruner="none")
    reports, study = search(tmp_path, Objective(), pruner="none")
    assert [one.number for one in reports] == [3, 4, 5, 6, 7]
    assert [state_of(trial) for trial in study.trials] == ["complete"] * 8
    assert search(tmp_path, Objective(), pruner="none")[0] == []


def test_a_resumed_study_draws_what_an_unbroken_one_would(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole, _ = search(tmp_path / "a", Objective(), num_trials=6, pruner="none")
    first, _ = search(tmp_path / "b", Objective(), num_trials=3, pruner="none")
    rest, _ = search(tmp_path / "b", Objective(), num_trials=6, pruner="none")
    assert [one.params for one in whole] == [one.params for one in (*first, *rest)]


def asked(folder: Path, process: str, minutes_ago: float) -> None:
    """A trial that somebody has begun, and was last heard of some time ago."""
    path = folder / "space.yaml"
    path.write_text(SPACE)
    space = read_space(path, ("learning_rate", "num_layers", "loss"))
    trial = opened(folder, pruner="none").ask(fixed_distributions=dict(space))
    trial.set_user_attr("process", process)
    trial.set_user_attr("progress", {"seen": time.time() - 60 * minutes_ago, "run": "runs:/7"})


def test_a_silent_machine_s_trial_is_replaced(tmp_path: Path) -> None:
    asked(tmp_path, "there:7:7", 61)
    reports, study = search(tmp_path, Objective(), num_trials=2, pruner="none")
    assert [state_of(trial) for trial in study.trials] == ["lost", "complete", "complete"]
    assert len(reports) == 2


@pytest.mark.parametrize("process", ["here:dead:1", CLAIMS.process])
def test_a_dead_process_s_trial_is_gone_on_with(tmp_path: Path, process: str) -> None:
    asked(tmp_path, process, 0)
    seen: list[tuple[int, str]] = []

    def objective(trial: Trial) -> Epochs:
        seen.append((trial.number, trial.run))
        return (yield from Objective()(trial))

    reports, study = search(tmp_path, objective, num_trials=2, pruner="none")
    assert [state_of(trial) for trial in study.trials] == ["complete"] * 2
    assert [one.number for one in reports] == [0, 1]
    assert seen == [(0, "runs:/7"), (1, "")]


def test_epochs_told_before_are_not_judged_again(tmp_path: Path) -> None:
    """The one that died told of three epochs; only the last may have been left unjudged."""
    asked(tmp_path, "here:dead:1", 0)
    study = opened(tmp_path)
    begun = optuna.Trial(study, study.trials[0]._trial_id)
    for epoch in (1, 2, 3):
        begun.report(0.1 * epoch, step=epoch)
    judged: list[int] = []

    class Noted(optuna.pruners.NopPruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            judged.append(trial.last_step or 0)
            return False

    study.pruner = Noted()
    space = read_space(tmp_path / "space.yaml", ("learning_rate", "num_layers", "loss"))
    with warnings.catch_warnings(action="error"):
        list(run_trials(Objective(), study, space, CLAIMS, metric="tau_6", num_trials=1))
    assert judged == [3, 4, 5, 6]
    assert sorted(study.trials[0].intermediate_values) == [1, 2, 3, 4, 5, 6]


def test_another_machine_s_trial_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(tmp_path)
    theirs = study.ask()
    theirs.set_user_attr("process", "there:7:7")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            study.tell(theirs, 2.0)

    monkeypatch.setattr("xsd.search.trials.time.sleep", sleep)
    reports, _ = search(tmp_path, Objective(), num_trials=2, pruner="none")
    assert len(waits) == 3
    assert [one.number for one in reports] == [1]


def test_a_trial_that_began_long_ago_but_reports_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(tmp_path)
    theirs = study.ask()
    theirs.set_user_attr("process", "there:7:7")
    theirs.set_user_attr("progress", {"seen": time.time() + 2 * 3600})
    monkeypatch.setattr(
        "xsd.search.trials.time.sleep", lambda _: study.tell(theirs, 2.0, skip_if_finished=True)
    )
    monkeypatch.setattr(
        "xsd.search.trials.time.time",
        lambda: (datetime.now() + timedelta(hours=2)).timestamp(),
    )
    reports, study = search(tmp_path, Objective(), num_trials=1)
    assert reports == []
    assert state_of(study.trials[0]) == "complete"


def test_a_diverging_trial_fails_alone_and_is_not_tried_again(tmp_path: Path) -> None:
    def diverges(trial: Trial) -> Epochs:
        yield report(0, 1.0)
        if trial.number == 1:
            raise XsdError("the loss became nan")
        return {}

    reports, study = search(tmp_path, diverges, num_trials=3, pruner="none")
    assert [one.state for one in reports] == ["complete", "failed", "complete"]
    assert "nan" in reports[1].reason
    assert candidate(study).accept_length == 1.0
    assert search(tmp_path, diverges, num_trials=3, pruner="none")[0] == []


def test_no_trial_completed(tmp_path: Path) -> None:
    def silent(trial: Trial) -> Epochs:
        yield from ()
        return {}

    reports, study = search(tmp_path, silent, num_trials=2)
    assert [one.state for one in reports] == ["failed", "failed"]
    with pytest.raises(XsdError, match="no trial"):
        candidate(study)


def test_a_trial_too_many_is_withdrawn(tmp_path: Path) -> None:
    """Another process asks between the count and the question."""

    class Racing:
        def __init__(self) -> None:
            self.study = opened(tmp_path)

        def __call__(self, trial: Trial) -> Epochs:
            yield report(0, 1.0)
            return {}

    study = opened(tmp_path)
    asked = study.ask

    def ask(*args: object, **kwargs: object) -> object:
        if not counted(study):
            theirs = asked()
            study.tell(theirs, 1.0)
        return asked(*args, **kwargs)  # type: ignore[arg-type]

    study.ask = ask  # type: ignore[assignment, method-assign]
    from xsd.search.trials import run_trials

    found = list(run_trials(Racing(), study, {}, CLAIMS, metric="tau_6", num_trials=1))
    assert found == []
    assert [state_of(trial) for trial in study.trials] == ["complete", "lost"]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["study.log", "sqlite:///study.db"])
def test_processes_share_a_study(tmp_path: Path, storage: str) -> None:
    opened(tmp_path, storage=_at(tmp_path, storage))
    body = f"""
import sys
from dataclasses import replace
from pathlib import Path
from tests.search.conftest import CLAIMS, Objective, search
claims = replace(CLAIMS, process=f"here:{{sys.argv[1]}}:1")
found, _ = search(Path({str(tmp_path)!r}), Objective(2), num_trials=9, claims=claims,
                  storage={_at(tmp_path, storage)!r}, pruner="none")
print(*[one.number for one in found])
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", body, str(n)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    study = opened(tmp_path, storage=_at(tmp_path, storage))
    complete = {str(trial.number) for trial in counted(study)}
    assert len(complete) == 9
    assert sorted(outputs[0] + outputs[1]) == sorted(complete)
    params = [tuple(trial.params.items()) for trial in counted(study)]
    assert len(set(params)) == 9, "two processes drew the same trial"


def _at(folder: Path, storage: str) -> str:
    if storage.startswith("sqlite:///"):
        return f"sqlite:///{folder}/{storage.removeprefix('sqlite:///')}"
    return str(folder / storage)

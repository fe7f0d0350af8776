"""A study whose processes are killed at random moments ends as if nobody had been."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.killing import kill_until_done
from tests.search.conftest import CLAIMS, Epochs, Objective, opened, search
from xsd.search.study import LOST, state_of
from xsd.search.trials import Trial

NUM_TRIALS, NUM_EPOCHS = 6, 4


class Slow(Objective):
    """Takes a moment an epoch, and notes every trial that it began."""

    def __init__(self, folder: Path) -> None:
        super().__init__(NUM_EPOCHS)
        self.folder = folder

    def __call__(self, trial: Trial) -> Epochs:
        (self.folder / f"began_{trial.number}").touch()
        for report in super().__call__(trial):
            time.sleep(0.01)
            yield report
        return {}


def _search_in_child(folder: Path) -> None:
    mine = f"here:{os.getpid()}:1"
    # Whoever else has a trial was killed before this one began.
    claims = replace(CLAIMS, process=mine, is_gone=lambda process: process != mine)
    search(folder, Slow(folder), num_trials=NUM_TRIALS, claims=claims, pruner="none")
    os._exit(0)


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    deaths = kill_until_done(_search_in_child, tmp_path, draw=random.Random(0))
    assert deaths >= 3
    trials = opened(tmp_path).get_trials(deepcopy=False)
    states = [state_of(trial) for trial in trials]
    assert states.count("complete") == NUM_TRIALS
    # Lost is only what nobody had begun: it was killed between asking for a trial and claiming it.
    lost = [trial for trial, state in zip(trials, states, strict=True) if state == LOST]
    assert len(trials) == NUM_TRIALS + len(lost)
    assert not any("process" in trial.user_attrs for trial in lost)
    for trial, state in zip(trials, states, strict=True):
        if state == "complete":
            assert trial.values == [trial.params["num_layers"]]
            assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
    # What had ended was not begun again, and no trial was begun that the study does not know.
    began = {int(path.name.removeprefix("began_")) for path in tmp_path.glob("began_*")}
    assert began <= {trial.number for trial in trials}
    # Whatever was lost before it, a trial draws what its number does.
    assert search(tmp_path, Objective(), num_trials=NUM_TRIALS, pruner="none")[0] == []

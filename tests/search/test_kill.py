"""A study whose processes are killed at random moments ends as if nobody had been."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

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
    fork = multiprocessing.get_context("fork")
    draw, deaths, spared = random.Random(0), 0, 0.05
    while True:
        child = fork.Process(target=_search_in_child, args=(tmp_path,))
        child.start()
        child.join(timeout=draw.uniform(0.0, spared))
        if child.exitcode == 0:
            break
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        deaths += 1
        # However slow the machine: a trial ends at last.
        spared *= 1.2
    assert deaths >= 3
    trials = opened(tmp_path).get_trials(deepcopy=False)
    states = [state_of(trial) for trial in trials]
    assert states.count("complete") == NUM_TRIALS
    assert set(states) <= {"complete", LOST} and states.count(LOST) <= deaths
    for trial, state in zip(trials, states, strict=True):
        if state == "complete":
            assert trial.values == [trial.params["num_layers"]]
            assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
    # What had ended was not begun again, and no trial was begun that the study does not know.
    began = {int(path.name.removeprefix("began_")) for path in tmp_path.glob("began_*")}
    assert began <= {trial.number for trial in trials} and len(trials) <= NUM_TRIALS + deaths
    # Whatever was lost before it, a trial draws what its number does.
    assert search(tmp_path, Objective(), num_trials=NUM_TRIALS, pruner="none")[0] == []

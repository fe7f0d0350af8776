"""Searches that train nothing: a trial is worth what its parameters say."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna

from xsd.search.space import read_space
from xsd.search.study import open_study, storage_of
from xsd.search.trials import Claims, Trial, TrialReport, run_trials
from xsd.search_config import SearchConfig
from xsd.types import EpochReport

SPACE = """
learning_rate: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}
num_layers: {type: int, low: 1, high: 3}
loss: {type: categorical, choices: [token, feature]}
"""
CLAIMS = Claims(
    "here:1:1", lambda process: process == "here:dead:1", stale_seconds=3600, lock=nullcontext
)

Epochs = Generator[EpochReport, None, Mapping[str, float]]


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
        self.left: list[int] = []

    def __call__(self, trial: Trial) -> Epochs:
        try:
            for epoch in range(self.num_epochs):
                yield report(epoch, trial.params["num_layers"] * (epoch + 1) / self.num_epochs)
        except GeneratorExit:
            self.left.append(trial.number)
            raise
        return {}


def opened(folder: Path, storage: str | None = None, **options: Any) -> optuna.Study:
    config = SearchConfig(**{"num_startup_trials": 2, "storage": storage, **options})
    return open_study(storage_of(config, folder), "tiny-L4", config, seed=0, num_epochs=6)


def search(
    folder: Path,
    objective: Any,
    *,
    num_trials: int = 8,
    claims: Claims = CLAIMS,
    space: str = SPACE,
    storage: str | None = None,
    **options: Any,
) -> tuple[list[TrialReport], optuna.Study]:
    path = folder / f"space_{claims.process.replace(':', '_')}.yaml"
    path.write_text(space)
    names = ("learning_rate", "num_layers", "loss")
    study = opened(folder, storage, **options)
    found = run_trials(
        objective, study, read_space(path, names), claims, metric="tau_6", num_trials=num_trials
    )
    return list(found), study

"""What a sweep adds to a trial: the store, the search and the run, over training itself.

    python -m benchmarks.sweep                     # 50 trials on the project's kind of store
    python -m benchmarks.sweep --storage sqlite    # the study in a database, too

A trial trains one epoch of almost nothing; the training is timed inside each trial and taken off.
Everything happens in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from tests.commands.conftest import World, make_world
from xsd.cli import main
from xsd.commands import train

SPACE = """
learning_rate: {type: float, low: 1.0e-3, high: 1.0e-2, log: true}
dropout: {type: float, low: 0.0, high: 0.3}
ffn_dim: {type: categorical, choices: [8, 16]}
"""


@contextmanager
def timed_training(seconds: list[float]) -> Iterator[None]:
    """Collect what every trial spends on building, fitting and validating its adapter."""
    original = train.fit_reports

    def fit_reports(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        adapter, reports = original(*args, **kwargs)  # type: ignore[arg-type]
        spent = time.perf_counter() - start

        def counting() -> Iterator[object]:
            nonlocal spent
            while True:
                begun = time.perf_counter()
                report = next(reports, None)
                spent += time.perf_counter() - begun
                if report is None:
                    seconds.append(spent)
                    return
                yield report

        return adapter, counting()

    with patch.object(train, "fit_reports", fit_reports):
        yield


def sweep(world: World, num_trials: int, storage: str) -> float:
    """Seconds of one sweep, as a user would start it."""
    flags = ["--num_trials", str(num_trials), "--num_epochs", "1", "--space", "space.yaml"]
    where = ["--storage", "sqlite:///study.db"] if storage == "sqlite" else []
    start = time.perf_counter()
    code = main(["sweep", *world.train_flags, "--level", "L4", *flags, *where])
    assert code == 0
    return time.perf_counter() - start


def run(num_trials: int, storage: str) -> None:
    torch.set_num_threads(1)
    world = make_world(Path.cwd() / "world")
    Path("space.yaml").write_text(SPACE)
    training: list[float] = []
    with timed_training(training):
        sweep(world, 2, storage)  # imports
        few = sweep(world, 4, storage)
        many = sweep(world, 4 + num_trials, storage)
    trained = training[4:]
    added = (many - sum(trained)) / num_trials * 1000
    # Both sweeps do once what is done once: inputs, figures, the best trial as a model.
    marginal = (many - few - sum(trained) + sum(training[2:4])) / (num_trials - 2) * 1000
    print(f"\n{num_trials} trials in {many:.1f} s; training alone {sum(trained):.1f} s")
    print(f"median training of a trial: {statistics.median(trained) * 1000:.1f} ms")
    print(f"added per trial: {added:.1f} ms; without what a sweep does once: {marginal:.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_trials", type=int, default=50)
    parser.add_argument("--storage", choices=("journal", "sqlite"), default="journal")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.chdir(folder)
        run(options.num_trials, options.storage)

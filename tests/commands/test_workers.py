"""Work in processes of its own: children of the run, errors that surface, an end that is told."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from xsd.commands.workers import workers
from xsd.errors import XsdError
from xsd.tracking import store
from xsd.tracking.run import stage_run

ENDLESS = ("endless 1", "endless 2")


def work(name: str) -> tuple[str, int]:
    with stage_run("train", "tiny", {}, name=name) as run:
        if name == "wrong":
            raise XsdError("the loss became nan")
        if name.startswith("endless"):
            Path(name).touch()
            time.sleep(600)
        return run.run_id, os.getpid()


def status(name: str) -> str:
    found = store.client().search_runs(store.experiment_ids(), f"attributes.run_name = '{name}'")
    return str(found[0].info.status)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_stages_are_children_and_errors_surface(workplace: Path, num_workers: int) -> None:
    with (
        stage_run("main", "tiny", {}) as parent,
        workers(num_workers, parent.run_id) as pool,
    ):
        done = [pool.submit(work, name).result() for name in ("one", "two")]
        with pytest.raises(XsdError, match="the loss became nan"):
            pool.submit(work, "wrong").result()
    assert all((pid == os.getpid()) == (num_workers == 1) for _, pid in done)
    for run_id, _ in done:
        tags = store.client().get_run(run_id).data.tags
        assert tags["mlflow.parentRunId"] == parent.run_id
    assert status("one") == status("two") == "FINISHED" and status("wrong") == "FAILED"


def test_leaving_ends_what_is_under_way(workplace: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        stage_run("main", "tiny", {}) as parent,
        workers(2, parent.run_id) as pool,
    ):
        for name in ENDLESS:
            pool.submit(work, name)
        while not all(Path(name).exists() for name in ENDLESS):
            time.sleep(0.05)
        # More than the executor hands to its processes beforehand: those cannot be taken back.
        waiting = [pool.submit(work, f"waiting{index}") for index in range(8)]
        # Not by a signal: what a shell starts in the background does not get this one.
        raise KeyboardInterrupt
    assert [status(name) for name in ENDLESS] == ["KILLED", "KILLED"] and waiting[-1].cancelled()
    running = store.client().search_runs(store.experiment_ids(), "attributes.status = 'RUNNING'")
    assert not running

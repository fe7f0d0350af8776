"""Killed anywhere and started again, a training ends with the weights it would have had."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.adapters.conftest import SIZES, make_adapter
from tests.learning.test_fit import LM_HEAD, batches
from xsd.adapters.base import Adapter
from xsd.learning import fit as fit_module
from xsd.learning.batches import TrainBatch
from xsd.learning.config import FitConfig
from xsd.learning.fit import fit
from xsd.types import EpochReport

CONFIG = FitConfig(num_epochs=3, unroll_steps=2, early_stopping=0)
NUM_POINTS = 40


class Killed(BaseException):
    pass


class Fuse:
    """Burns by one at every point of note; at its end the process is as good as killed."""

    def __init__(self, length: int) -> None:
        self.left = length

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state after every step."""
    monkeypatch.setattr(fit_module, "_STATE_SECONDS", -1.0)
    monkeypatch.setattr(fit_module, "_STATE_SHARE", 1e9)


def run(
    adapter: Adapter, state: Path, fuse: Fuse, reports: dict[int, EpochReport], steps: list[int]
) -> None:
    """Train under the fuse; reports are kept, and the batches that were trained on counted."""

    def burning(epoch: int, skip: int) -> Iterator[TrainBatch]:
        for batch in batches(epoch, skip):
            fuse.burn()
            steps.append(epoch)
            yield batch

    def scorer(adapter: Adapter) -> dict[str, float]:
        fuse.burn()
        total = sum(x.abs().sum().item() for x in adapter.parameters())
        return {adapter.row.selection_metric: total}

    for report in fit(adapter, burning, CONFIG, scorer, lm_head=LM_HEAD, state=state):
        fuse.burn()
        reports[report.epoch] = replace(report, seconds=0.0)
        fuse.burn()


@pytest.mark.parametrize("name", ["L4", "E3"])
def test_killed_at_random_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_step: None, name: str
) -> None:
    sizes = replace(SIZES, num_layers=1, dropout=0.1)
    whole, expected, taken = make_adapter(name, sizes=sizes), dict[int, EpochReport](), list[int]()
    run(whole, tmp_path / "whole", Fuse(-1), expected, taken)
    draw = random.Random(0)
    fuse = Fuse(-1)
    # A file is written, made lasting, and put in its place: killed before, between or after.
    fsync, move = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (fuse.burn(), fsync(handle), fuse.burn()))
    monkeypatch.setattr(Path, "replace", lambda a, b: (fuse.burn(), move(a, b), fuse.burn()))
    for number in range(NUM_POINTS):
        state, reports, steps = tmp_path / str(number), dict[int, EpochReport](), list[int]()
        kills = 0
        while True:
            adapter = make_adapter(name, sizes=sizes)
            fuse = Fuse(draw.randrange(1, 45))
            try:
                run(adapter, state, fuse, reports, steps)
                break
            except Killed:
                kills += 1
        assert reports == expected
        for a, b in zip(whole.parameters(), adapter.parameters(), strict=True):
            assert torch.equal(a, b)
        # No more than the batch in hand was done again.
        assert len(steps) <= len(taken) + kills


def test_a_state_waits_for_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    save = fit_module.save_state
    monkeypatch.setattr(
        fit_module, "save_state", lambda *args: (written.append(args[1].step), save(*args))
    )
    run(make_adapter("L1"), tmp_path / "state", Fuse(-1), {}, [])
    assert written == [2, 4, 6], "after every epoch, which takes no second here"

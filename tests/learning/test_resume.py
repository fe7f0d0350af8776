"""Killed anywhere and started again, a training ends with the weights it would have had."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.adapters.conftest import SIZES, make_adapter
from tests.killing import LONGEST, kill_until_done
from tests.learning.test_fit import LM_HEAD, batches
from xsd.adapters.base import Adapter
from xsd.learning import fit as fit_module
from xsd.learning import latest as latest_module
from xsd.learning.batches import TrainBatch
from xsd.learning.config import FitConfig
from xsd.learning.fit import fit
from xsd.learning.latest import Latest
from xsd.types import EpochReport

CONFIG = FitConfig(num_epochs=3, unroll_steps=2, early_stopping=0)
NUM_POINTS = 40


class Burning:
    """A tensor whose being written to is a point of note."""

    def __init__(self, tensor: Tensor, fuse: Fuse) -> None:
        self._tensor, self._fuse = tensor, fuse

    def zero_(self) -> None:
        self._tensor.zero_()
        self._fuse.burn()

    def copy_(self, source: Tensor) -> None:
        self._fuse.burn()
        self._tensor.copy_(source)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
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
    # The latest state is written over in place: killed with half of it there, or all but its end.
    mapped = latest_module._mapped

    def burning(path: Path) -> dict[str, Tensor]:
        tensors = mapped(path)
        return {**tensors, "progress": Burning(tensors["progress"], fuse)}  # type: ignore[dict-item]

    monkeypatch.setattr(latest_module, "_mapped", burning)
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


def test_the_disk_waits_for_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    save = fit_module.save_state
    monkeypatch.setattr(
        fit_module, "save_state", lambda *args: (written.append(args[1].step), save(*args))
    )
    run(make_adapter("L1"), tmp_path / "state", Fuse(-1), {}, [])
    assert written == [], "it takes no second here"
    monkeypatch.setattr(Latest, "is_possible", lambda: False)
    monkeypatch.setattr(fit_module, "_STATE_SHARE", 1e9)
    run(make_adapter("L1"), tmp_path / "other", Fuse(-1), {}, [])
    assert written == [2, 4, 6], "after every epoch, where nothing else is kept"


def test_what_a_machine_left_that_went_down_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, reports, steps = tmp_path / "state", dict[int, EpochReport](), list[int]()
    with pytest.raises(Killed):
        run(make_adapter("L4"), state, Fuse(8), reports, steps)
    assert len(list(tmp_path.glob("state.latest*"))) == 2 and not state.exists()
    start = tmp_path / "start"
    start.write_text("another")
    monkeypatch.setattr(latest_module, "_SINCE_START", start)
    run(make_adapter("L4"), state, Fuse(-1), again := dict[int, EpochReport](), taken := [])
    assert len(taken) == 6 and again.keys() == {0, 1, 2}, "from the start"


def test_keeping_a_state_is_no_step_of_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that gradients flowed through would hold a graph that grows with every step."""
    made: list[dict[str, Tensor]] = []
    mapped = latest_module._mapped
    monkeypatch.setattr(
        latest_module, "_mapped", lambda path: made.append(mapped(path)) or made[-1]
    )
    run(make_adapter("L4"), tmp_path / "state", Fuse(-1), {}, [])
    assert len(made) == 2 and any(name.startswith("weight.") for name in made[0])
    assert not any(x.requires_grad for copy in made for x in copy.values())


LONG = replace(CONFIG, num_epochs=30)


def _train_in_child(folder: Path) -> None:
    """One training, which notes every batch that it begins; as a process of its own."""

    def noted(epoch: int, skip: int) -> Iterator[TrainBatch]:
        for batch in batches(epoch, skip):
            with (folder / "begun").open("ab") as file:
                file.write(b".")
            yield batch

    def scorer(adapter: Adapter) -> dict[str, float]:
        total = sum(x.abs().sum().item() for x in adapter.parameters())
        return {adapter.row.selection_metric: total}

    adapter = make_adapter("L4", sizes=replace(SIZES, num_layers=1))
    for _ in fit(adapter, noted, LONG, scorer, lm_head=LM_HEAD, state=folder / "state"):
        pass
    torch.save(adapter.state_dict(), folder / "weights.pt")
    os._exit(0)


def main(folder: Path, seed: int) -> None:
    """Forks, so it runs in a process that has no threads yet."""
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    never = random.Random()
    never.uniform = lambda a, b: LONGEST  # type: ignore[method-assign]
    assert kill_until_done(_train_in_child, folder / "whole", draw=never) == 0
    deaths = kill_until_done(_train_in_child, folder / "killed", draw=random.Random(seed))
    begun = [(folder / name / "begun").stat().st_size for name in ("whole", "killed")]
    whole, killed = (torch.load(folder / name / "weights.pt") for name in ("whole", "killed"))
    assert all(torch.equal(x, killed[name]) for name, x in whole.items())
    print(json.dumps({"deaths": deaths, "whole": begun[0], "killed": begun[1]}))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_random_moments(tmp_path: Path, seed: int) -> None:
    command = f"from {__name__} import *; main(Path({str(tmp_path)!r}), {seed})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["deaths"] >= 3 and told["whole"] == 60
    assert told["killed"] <= told["whole"] + told["deaths"]

"""A second process has what a killed training had copied after its latest step."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.adapters.conftest import make_adapter
from tests.learning.test_fit import LM_HEAD, batches
from xsd.adapters.base import Adapter
from xsd.errors import XsdError
from xsd.learning import keeper as keeper_module
from xsd.learning.batches import TrainBatch
from xsd.learning.config import FitConfig
from xsd.learning.fit import fit
from xsd.learning.keeper import Keeper, _progress, _record, wait_for_keeper
from xsd.learning.state import FitState, read_state, write_state

pytestmark = pytest.mark.skipif(not Keeper.is_possible(), reason="it needs Linux")

CPU = torch.device("cpu")
BEFORE = FitState(epoch=2, step=40, best=0.5, epochs_since_best=1, num_batches=3, loss_sum=7.0)


def keep(folder: Path, num_steps: int) -> Keeper:
    """Steps that add 1 to everything, each noted in a file when its state was kept."""
    keeper = Keeper(folder / "state", "key", CPU)
    tensors = {"a": torch.zeros(300, 7), "b": torch.zeros(())}
    keeper.begin(BEFORE)
    for number in range(num_steps):
        for x in tensors.values():
            x += 1
        keeper.count(torch.tensor(number + 1.0))
        keeper.put(tensors)
        with (folder / "noted").open("ab") as file:
            file.write(b".")
    return keeper


def kept(folder: Path) -> tuple[FitState, dict[str, Tensor]]:
    wait_for_keeper(folder / "state")
    progress, tensors = read_state(folder / "state", "key")
    return FitState(**progress), tensors


def check(folder: Path) -> int:
    """Of how many steps the state is, all of it."""
    progress, tensors = kept(folder)
    num_steps = progress.step - BEFORE.step
    loss_sum = BEFORE.loss_sum + num_steps * (num_steps + 1) / 2
    assert progress == FitState(
        epoch=2, step=progress.step, best=0.5, epochs_since_best=1,
        num_batches=BEFORE.num_batches + num_steps, loss_sum=loss_sum,
    )  # fmt: skip
    assert all(bool((x == num_steps).all()) for x in tensors.values())
    return num_steps


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_loses_no_step_that_was_kept(tmp_path: Path, seed: int) -> None:
    command = f"from {__name__} import *; keep(Path({str(tmp_path)!r}), 10**9)"
    # Killed with its whole group, as a shell does it.
    training = subprocess.Popen([sys.executable, "-c", command], start_new_session=True)
    noted = tmp_path / "noted"
    until = time.monotonic() + 60
    while not noted.exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.0, 0.3))
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    num_noted = noted.stat().st_size
    assert num_noted <= check(tmp_path) <= num_noted + 1
    assert not list(tmp_path.glob("*.lock"))


def test_one_keeper_serves_one_training_after_the_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        keep(tmp_path / name, 5).leave()
        assert check(tmp_path / name) == 5
    (tmp_path / "c").mkdir()
    keep(tmp_path / "c", 5).forget()
    wait_for_keeper(tmp_path / "c" / "state")
    assert not (tmp_path / "c" / "state").exists()


def test_a_state_on_disk_that_is_newer_stays(tmp_path: Path) -> None:
    keep(tmp_path, 5).leave()
    assert check(tmp_path) == 5
    keep(tmp_path, 3).leave()
    assert check(tmp_path) == 5


def test_what_is_not_whole_or_has_diverged_is_no_state() -> None:
    record = _record(BEFORE)
    assert _progress(record) == BEFORE
    assert _progress(_record(FitState())) == FitState()
    assert _progress([0.0, *record[1:]]) is None
    assert _progress([*record[:-1], float("nan")]) is None


def test_no_room_is_told(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "state", "key", CPU)
    keeper.begin(FitState())
    with pytest.raises(XsdError, match="no copies of the training's state are kept"):
        keeper.put({"a": torch.zeros(1).expand(10**14)})
    keeper.forget()
    keep(tmp_path, 2).leave()
    assert check(tmp_path) == 2, "the same process serves on"


def test_what_was_left_is_on_disk_when_leaving_returns(tmp_path: Path) -> None:
    """Whoever stops a training may remove its folder at once, and it stays removed."""
    for _ in range(3):
        (tmp_path / "a").mkdir()
        keep(tmp_path / "a", 3).leave()
        assert (tmp_path / "a" / "state").exists()
        shutil.rmtree(tmp_path / "a")
        time.sleep(0.05)
        assert not (tmp_path / "a").exists()


def test_a_keeper_that_has_died_is_no_error(tmp_path: Path) -> None:
    keeper = keep(tmp_path, 3)
    keeper_module._KEEPERS[-1].kill()
    keeper_module._KEEPERS[-1].wait()
    keeper.leave()
    assert not (tmp_path / "state").exists()
    keep(tmp_path, 2).leave()
    assert check(tmp_path) == 2, "the next training has another one"


def test_a_state_that_cannot_be_written_is_told_and_the_keeper_serves_on(
    tmp_path: Path,
) -> None:
    write_state(tmp_path / "state", asdict(BEFORE), {"a": torch.zeros(1)}, "another")
    num_keepers = len(keeper_module._KEEPERS)
    with pytest.warns(UserWarning, match="the latest steps are lost"):
        keep(tmp_path, 3).leave()
    assert read_state(tmp_path / "state", "another")[0] == asdict(BEFORE)
    (tmp_path / "b").mkdir()
    keep(tmp_path / "b", 2).leave()
    assert check(tmp_path / "b") == 2 and len(keeper_module._KEEPERS) <= num_keepers + 1


def test_two_trainings_of_one_state_do_not_wait_for_each_other(tmp_path: Path) -> None:
    first = keep(tmp_path, 3)
    with pytest.raises(XsdError, match="no copies of the training's state are kept"):
        keep(tmp_path, 1)
    first.leave()
    assert check(tmp_path) == 3


def test_trainings_beside_each_other_have_one_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    keepers = [keep(tmp_path / name, 3) for name in ("a", "b")]
    for keeper, name in zip(keepers, ("a", "b"), strict=True):
        keeper.leave()
        assert check(tmp_path / name) == 3


def test_who_still_holds_a_state_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = keep(tmp_path, 1)
    monkeypatch.setattr(keeper_module, "_PATIENCE", 0.1)
    with pytest.raises(XsdError, match="another training has held it"):
        wait_for_keeper(tmp_path / "state")
    keeper.forget()


# ---------------------------------------------------------------- a training on a GPU

LONG = FitConfig(num_epochs=100, unroll_steps=2, early_stopping=0, mixed_precision="no")


def train(folder: Path) -> None:
    """One training on the GPU, which notes every step that has ended and every batch it begins."""
    cuda = torch.device("cuda")

    def noted(epoch: int, skip: int) -> Iterator[TrainBatch]:
        for number, batch in enumerate(batches(epoch, skip), skip):
            with (folder / "begun").open("ab") as file:
                file.write(b".")
            yield replace(batch, streams=batch.streams.to(cuda))
            torch.cuda.synchronize()
            (folder / "ended").write_text(str(2 * epoch + number + 1))

    def scorer(adapter: Adapter) -> dict[str, float]:
        total = sum(x.abs().sum().item() for x in adapter.parameters())
        return {adapter.row.selection_metric: total}

    wait_for_keeper(folder / "state")
    ended, found = folder / "ended", steps_of(folder / "state")
    if ended.exists():
        assert int(ended.read_text()) <= found, "a step that had ended was lost"
    lost = _size(folder / "begun") - _size(folder / "lost") - found
    assert 0 <= lost <= 1, "more than the batch in hand was lost"
    with (folder / "lost").open("ab") as file:
        file.write(b"." * lost)
    adapter = make_adapter("L4").to(cuda)
    lm_head = LM_HEAD.to(cuda)
    for _ in fit(adapter, noted, LONG, scorer, lm_head=lm_head, state=folder / "state"):
        pass
    torch.save(adapter.state_dict(), folder / "weights.pt")
    torch.cuda.synchronize()
    os._exit(0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def steps_of(state: Path) -> int:
    if not state.exists():
        return 0
    with safe_open(state, framework="pt") as file:
        return int(json.loads(file.metadata()["progress"])["step"])


def train_until_done(folder: Path, draw: random.Random | None) -> int:
    """Killed a while after its first step, and started again; how many times. None: left alone."""
    folder.mkdir()
    deaths = 0
    while True:
        command = f"from {__name__} import *; train(Path({str(folder)!r}))"
        begun = _size(folder / "begun")
        training = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.PIPE)
        while draw is not None and training.poll() is None:
            if _size(folder / "begun") > begun:
                time.sleep(draw.uniform(0.0, 1.0 + deaths))
                training.kill()
                break
            time.sleep(0.01)
        _, said = training.communicate()
        if training.returncode == 0:
            return deaths
        assert training.returncode == -signal.SIGKILL, said.decode()[-2000:]
        deaths += 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
def test_a_killed_training_on_a_gpu_loses_the_batch_in_hand(tmp_path: Path) -> None:
    assert train_until_done(tmp_path / "whole", None) == 0
    deaths = train_until_done(tmp_path / "killed", random.Random(0))
    lost = _size(tmp_path / "killed" / "lost")
    assert deaths >= 2 and lost <= deaths
    assert _size(tmp_path / "killed" / "begun") == 2 * LONG.num_epochs + lost
    whole, killed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "killed"))
    for name, x in whole.items():
        torch.testing.assert_close(killed[name], x, rtol=1e-3, atol=1e-4)

"""Training and evaluation by two processes: the counts, and up to rounding the weights, of one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.conftest import World, xsd
from tests.launching import children, launched, worker

TOLERANCE = 1e-5
"""Of weights after two epochs at one learning rate, in float32: sums are taken in another order."""


def launch(*words: object) -> None:
    process = launched(2, *words)
    told, _ = process.communicate(timeout=500)
    assert process.returncode == 0, told[-3000:]


def _beside_keys(bias: torch.Tensor) -> tuple[slice, slice]:
    width = len(bias) // 3
    return slice(0, width), slice(2 * width, None)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(world: World, workplace: Path) -> None:
    words = ["train", *world.train_flags, "--level", "E1", "--dropout", "0", "--device", "cpu"]
    launch(*words, "--output_dir", "two")
    xsd(*words, "--output_dir", "one", "--rerun")
    [two], [one] = (list(Path(name, "E1").iterdir()) for name in ("two", "one"))
    ours, theirs = (load_file(path / "final_model.safetensors") for path in (one, two))
    for name, tensor in ours.items():
        pairs = [(tensor, theirs[name])]
        if name.endswith("query_key_value.bias"):
            # Attention does not see a key's bias: its gradient is rounding, whatever is trained.
            pairs = [(x[part], y[part]) for x, y in pairs for part in _beside_keys(x)]
        for x, y in pairs:
            torch.testing.assert_close(y, x, rtol=TOLERANCE, atol=TOLERANCE)
    histories = [json.loads((path / "history.json").read_text()) for path in (one, two)]
    for a, b in zip(*histories, strict=True):
        assert a["step"] == b["step"]
        assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], rel=1e-5)
    given = ["evaluate", *world.pair_flags, "--checkpoint", one, "--data", world.data]
    given += ["--lm_head", world.head, "--batch_size", "2"]
    launch(*given, "--output_dir", "counts_two")
    xsd(*given, "--output_dir", "counts_one", "--rerun")
    counts = [
        json.loads(Path(name, "acceptance_metrics.json").read_text())["counts"]
        for name in ("counts_one", "counts_two")
    ]
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_launch_that_loses_one_process_goes_on(world: World, workplace: Path, rank: int) -> None:
    """Nobody waits for the dead one; asked again, the launch ends with the weights that it would
    have had."""
    words = ["train", *world.train_flags, "--level", "E1", "--device", "cpu"]
    words += ["--num_epochs", "30", "--early_stopping", "0"]
    lost = launched(2, *words, "--output_dir", "lost")
    while lost.poll() is None and not [*Path("lost").rglob("history.json")]:
        time.sleep(0.01)
    worker(lost, rank).kill()
    told, _ = lost.communicate(timeout=300)
    assert lost.returncode != 0, told
    assert not children(lost.pid)
    [before] = Path("lost").rglob("history.json")
    assert 0 < len(json.loads(before.read_text())) < 30, "it was over before it could be killed"
    launch(*words, "--output_dir", "lost")
    launch(*words, "--output_dir", "whole", "--rerun")
    [ours], [theirs] = (
        [*Path(name).rglob("final_model.safetensors")] for name in ("lost", "whole")
    )
    assert ours.parent == before.parent
    assert ours.read_bytes() == theirs.read_bytes()

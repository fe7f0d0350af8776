"""Training and evaluation by two processes: the counts, and up to rounding the weights, of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.conftest import World, xsd

TOLERANCE = 1e-5
"""Of weights after two epochs at one learning rate, in float32: sums are taken in another order."""


def launch(*words: object) -> None:
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", "-m", "xsd"]
    process = subprocess.run(
        [sys.executable, "-m", *command, *map(str, words)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(world: World, workplace: Path) -> None:
    words = ["train", *world.train_flags, "--level", "E1", "--dropout", "0", "--device", "cpu"]
    launch(*words, "--output_dir", "two")
    xsd(*words, "--output_dir", "one", "--rerun")
    [two], [one] = (list(Path(name, "E1").iterdir()) for name in ("two", "one"))
    ours, theirs = (load_file(path / "final_model.safetensors") for path in (one, two))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)
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

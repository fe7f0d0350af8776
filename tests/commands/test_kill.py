"""``xsd train`` under SIGKILL."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.conftest import World, xsd
from xsd.adapters import checkpoint

NUM_KILLS = 3
PATIENCE_SECONDS = 300.0


@pytest.mark.slow
def test_killed_and_started_again(world: World, workplace: Path) -> None:
    words = ["train", *map(str, world.train_flags), "--level", "E1", "--early_stopping", "0"]
    words[words.index("--num_epochs") + 1] = "30"
    draw = random.Random(0)

    def folder() -> Path | None:
        return next(iter(Path("outputs/train/E1").glob("E1_*")), None)

    def epochs() -> int:
        found = folder()
        path = None if found is None else found / "history.json"
        return len(json.loads(path.read_text())) if path and path.is_file() else 0

    for _ in range(NUM_KILLS):
        before, deadline = epochs(), time.monotonic() + PATIENCE_SECONDS
        process = subprocess.Popen([sys.executable, "-m", "xsd", *words])
        while epochs() < before + draw.randrange(1, 6) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -9, "it was over before it could be killed"
    xsd(*words)
    found = folder()
    assert found is not None and not (found / ".unfinished").exists()
    assert epochs() == 30
    xsd(*words, "--rerun")
    [whole] = set(Path("outputs/train/E1").iterdir()) - {found}
    sums = [checkpoint.load(path)[1]["sha256"] for path in (found, whole)]
    assert sums[0] == sums[1]
    histories = [json.loads((path / "history.json").read_text()) for path in (found, whole)]
    for a, b in zip(*histories, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}

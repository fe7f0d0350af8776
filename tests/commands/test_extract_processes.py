"""Several processes of one launch make what one makes, and pick up what a lost one left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.conftest import World
from tests.hidden.test_resume import files
from xsd.cli import main
from xsd.hidden.store import HiddenStore

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FLAGS = {
    "max_new_tokens": 8,
    "max_questions": 3,
    "batch_clips": 1,
    "split": "train",
    "rerun": "true",
}


def words(world: World, folder: str) -> list[str]:
    flags = {**FLAGS, "dataset_dir": world.scenes, "output_dir": folder}
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["extract", *world.pair_flags, *given]


def launched(world: World, folder: str, num_processes: int) -> subprocess.Popen[str]:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *launch, *plain, "--num_processes", str(num_processes), "-m", "xsd"]
    return subprocess.Popen(
        [*command, *words(world, folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_processes_make_what_one_makes(world: World, workplace: Path) -> None:
    both = launched(world, "two", 2)
    told, _ = both.communicate(timeout=600)
    assert both.returncode == 0, told
    assert told.count("extract: 18 train answers") == 1
    assert main(words(world, "one")) == 0
    one, two = (Path(name) / "chunked_train_1s_fp32" for name in ("one", "two"))
    assert files(one) == files(two)
    assert len(HiddenStore.open(two)) == 18


def test_the_share_of_a_lost_launch_is_picked_up(world: World, workplace: Path) -> None:
    """Killed with all its processes as soon as something is stored; then one process goes on."""
    folder = Path("lost/chunked_train_1s_fp32")
    lost = launched(world, "lost", 2)
    while lost.poll() is None and not [*folder.glob(".parts/part_*"), *folder.glob("chunks/*")]:
        time.sleep(0.02)
    os.killpg(lost.pid, signal.SIGKILL)
    lost.communicate()
    assert main(words(world, "lost")) == 0
    assert main(words(world, "one")) == 0
    assert files(folder) == files(Path("one/chunked_train_1s_fp32"))

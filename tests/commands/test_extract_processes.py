"""Several processes of one launch make what one makes, and pick up what a lost one left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launching
from tests.commands.conftest import World
from xsd.cli import main
from xsd.hidden.index import load_index
from xsd.hidden.store import HiddenStore

pytestmark = pytest.mark.slow
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
    return launching.launched(num_processes, *words(world, folder))


def assert_equal(one: Path, other: Path) -> None:
    """Keys, ids, lengths and counts to the last bit, states to the last one of bf16.

    A library's sums may run in another order where its buffers are aligned otherwise.
    """
    ours, theirs = load_index(one), load_index(other)
    assert [c.samples for c in ours.chunks] == [c.samples for c in theirs.chunks]
    assert (ours.failures, ours.num_batches) == (theirs.failures, theirs.num_batches)
    assert ours.complete and theirs.complete
    names = [sorted(p.relative_to(f) for p in f.rglob("*.safetensors")) for f in (one, other)]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        found, expected = load_file(other / name), load_file(one / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(found[key], tensor, rtol=2**-7, atol=1e-5)
            else:
                assert torch.equal(found[key], tensor), key


def test_two_processes_make_what_one_makes(world: World, workplace: Path) -> None:
    both = launched(world, "two", 2)
    told, _ = both.communicate(timeout=600)
    assert both.returncode == 0, told
    assert told.count("extract: 18 train answers") == 1
    assert main(words(world, "one")) == 0
    one, two = (Path(name) / "chunked_train_1s_fp32" for name in ("one", "two"))
    assert_equal(one, two)
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
    assert_equal(Path("one/chunked_train_1s_fp32"), folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launch_that_loses_one_process_ends_and_goes_on(
    world: World, workplace: Path, rank: int
) -> None:
    """Nobody waits for the dead one; the same launch, asked again, has all its answers."""
    folder = Path("lost/chunked_train_1s_fp32")
    lost = launched(world, "lost", 2)
    while lost.poll() is None and not [*folder.glob(".parts/part_*"), *folder.glob("chunks/*")]:
        time.sleep(0.02)
    launching.worker(lost, rank).kill()
    told, _ = lost.communicate(timeout=300)
    assert lost.returncode != 0, told
    assert not launching.children(lost.pid)
    again = launched(world, "lost", 2)
    told, _ = again.communicate(timeout=600)
    assert again.returncode == 0, told
    assert main(words(world, "one")) == 0
    assert_equal(Path("one/chunked_train_1s_fp32"), folder)

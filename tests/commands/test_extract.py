from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import World, xsd
from xsd.hidden.store import HiddenStore, find_folder
from xsd.tracking import products

FLAGS = ("--max_new_tokens", "8", "--max_questions", "3", "--batch_clips", "2")


def test_both_halves_are_kept_and_linked(
    world: World, runs: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["extract", *world.pair_flags, *FLAGS, "--dataset_dir", world.scenes]
    xsd(*words)
    xsd(*words)
    assert "reused run" in capsys.readouterr().out
    [run] = runs("extract")
    product = products.load(f"runs:/{run.info.run_id}")
    train, test = (HiddenStore.open(find_folder(product.path, h)) for h in ("train", "test"))
    assert (len(train), len(test)) == (18, 6)
    assert (
        run.data.metrics["train.num_samples"] == 18 and run.data.metrics["test.num_failures"] == 0
    )
    assert run.data.metrics["test.num_tokens"] == sum(len(s.verifier_ids) for s in test)
    assert product.tags["conditioning"] == "teacher_forced" and product.tags["quant"] == "fp32"
    assert product.tags["has_train"] == product.tags["has_test"] == "true"
    # The run's chunks are the written ones, not a second copy.
    [written] = Path("outputs/extract").rglob("chunked_test_1s_fp32/chunks/*.safetensors")
    [kept] = product.path.rglob("chunked_test_1s_fp32/chunks/*.safetensors")
    assert written.samefile(kept)
    names = {entry.dataset.name for entry in run.inputs.dataset_inputs}
    assert names == {"scenes", "chunked_train_1s_fp32", "chunked_test_1s_fp32"}


def test_a_folder_of_ones_own(world: World, workplace: Path) -> None:
    words = ["extract", *world.pair_flags, *FLAGS, "--dataset_dir", world.scenes]
    xsd(*words, "--split", "test", "--conditioning", "free_running", "--output_dir", "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["chunked_test_1s_fp32"]
    store = HiddenStore.open(Path("mine/chunked_test_1s_fp32"))
    assert store.header.conditioning == "free_running"
    assert any(len(s.drafter_ids) != len(s.verifier_ids) for s in store)


@pytest.fixture
def damaged(world: World, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(world.scenes, tmp_path / "damaged"))
    (folder / "mp4/train_0000/000000.mp4").write_bytes(b"not a video")
    return folder


def test_too_many_failures_fail_the_stage_and_a_few_are_counted(
    world: World,
    damaged: Path,
    runs: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["extract", *world.pair_flags, *FLAGS, "--dataset_dir", damaged, "--split", "train"]
    xsd(*words, expect=2)
    error = capsys.readouterr().err
    assert "3 of 18 answers failed, more than --max_failures 0.02 allows" in error
    assert "000000.mp4: cannot be decoded" in error and not runs("extract")
    xsd(*words, "--max_failures", "0.2")
    assert runs("extract")[0].data.metrics["train.num_failures"] == 3


def test_a_folder_without_an_index(
    world: World, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xsd("extract", *world.pair_flags, "--dataset_dir", workplace, expect=2)
    assert "holds no EventGPT_Instruction_Subset.json" in capsys.readouterr().err


def test_bad_values(capsys: pytest.CaptureFixture[str]) -> None:
    xsd("extract", "--batch_clips", "0", expect=2)
    assert "batch_clips=0: must be at least 1" in capsys.readouterr().err
    xsd("extract", "--conditioning", "mixed", expect=2)
    assert "'mixed' is not one of teacher_forced, free_running" in capsys.readouterr().err

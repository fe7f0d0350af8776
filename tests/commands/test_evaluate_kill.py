"""``xsd evaluate`` killed anywhere: the same command counts the rest, and finds the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.conftest import World, xsd
from xsd import metrics
from xsd.adapters import checkpoint
from xsd.adapters.catalog import build, configure
from xsd.adapters.config import AdapterSizes
from xsd.commands import evaluate as stage
from xsd.commands.journal import Journal
from xsd.counts import Counts
from xsd.hidden.index import signed
from xsd.metrics import Scored
from xsd.tracking.records import VARIABLE

SIZES = AdapterSizes(num_heads=4, ffn_dim=16, bottleneck_dim=8, max_positions=16)
FILES = ("acceptance_metrics.json", "position_stats.json", "METRICS_COMPARISON.md")
ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300.0


class Killed(BaseException):
    pass


@pytest.fixture
def words(world: World, workplace: Path) -> list[str]:
    """An evaluation of six batches, a test answer each."""
    torch.manual_seed(0)
    checkpoint.save(build(configure("L4", 24, 32, SIZES)), workplace / "L4")
    given = ["--checkpoint", workplace / "L4", "--data", world.data, "--lm_head", world.head]
    more = ["--batch_size", 1, "--output_dir", workplace / "out"]
    return ["evaluate", *world.pair_flags, *map(str, [*given, *more])]


@pytest.fixture
def expected(words: list[str], workplace: Path) -> dict[str, bytes]:
    """Of an evaluation that nobody disturbed."""
    words = [*words[:-1], str(workplace / "whole")]
    xsd(*words)
    return files(workplace / "whole")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A batch that is scored adds to it."""
    found: list[int] = []
    score_batch = metrics.score_batch

    def counting(*args: Any) -> Scored:
        found.append(len(found))
        return score_batch(*args)

    monkeypatch.setattr(metrics, "score_batch", counting)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def journals(folder: Path) -> list[Path]:
    return list(folder.glob(".counts_*"))


def num_kept(folder: Path) -> int:
    return sum(len(Journal(path).read()) for path in journals(folder))


def test_killed_behind_every_batch(
    words: list[str],
    expected: dict[str, bytes],
    scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Even with its results written, and beside the checkpoint that they are of."""
    counting, out = metrics.score_batch, Path("L4")
    words = words[:-2]
    for number in range(6):

        def dying(*args: Any, number: int = number) -> Scored:
            if num_kept(out) > number:
                raise Killed
            return counting(*args)

        monkeypatch.setattr(metrics, "score_batch", dying)
        with pytest.raises(Killed):
            xsd(*words, "--rerun") if number < 5 else _die_at_the_end(words, monkeypatch)
        assert num_kept(out) == number + 1
    xsd(*words, "--rerun", "--verifier_step_ms", 20)
    assert "goes on behind 6 batches" in capsys.readouterr().out
    assert len(scored) == 6 and journals(out) == []
    ours, theirs = (json.loads(all_[FILES[0]]) for all_ in (files(out), expected))
    assert ours["counts"] == theirs["counts"] and files(out)[FILES[1]] == expected[FILES[1]]
    xsd(*words, "--rerun")
    assert len(scored) == 12 and files(out) == expected


def _die_at_the_end(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*args: Any) -> str:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage, "variant", dying)
        xsd(*words, "--rerun")


@pytest.mark.parametrize("with_mlflow", [True, False])
def test_a_rerun_takes_no_counts_of_a_finished_run(
    words: list[str], scored: list[int], monkeypatch: pytest.MonkeyPatch, with_mlflow: bool
) -> None:
    """Killed after the run's end, before its counts were removed; an interrupted rerun goes on."""
    if not with_mlflow:
        monkeypatch.setenv(VARIABLE, "records")

    def dying(journal: Journal) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", dying)
        with pytest.raises(Killed):
            xsd(*words)
    assert len(scored) == num_kept(Path("out")) == 6
    with pytest.raises(Killed):
        _die_at_the_end(words, monkeypatch)
    assert len(scored) == 12
    xsd(*words, "--rerun")
    assert len(scored) == 12 and journals(Path("out")) == []


@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_damaged_counts_are_made_again(
    words: list[str],
    expected: dict[str, bytes],
    scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    with pytest.raises(Killed):
        _die_at_the_end(words, monkeypatch)
    [path] = Path("out").glob(".counts_*/0.jsonl")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-20], "altered": content, "empty": b""}[damage])
    num_lost = 6 - num_kept(Path("out"))
    assert num_lost == {"cut": 2, "altered": 1, "empty": 6}[damage]
    scored.clear()
    xsd(*words, "--rerun")
    assert len(scored) == num_lost and files(Path("out")) == expected


def test_other_counts_are_not_taken(
    words: list[str], scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another batch size, depth of drafts or adapter."""
    with pytest.raises(Killed):
        _die_at_the_end(words, monkeypatch)
    for more, num in ((["--batch_size", "2"], 3), (["--gamma_decode", "9"], 6)):
        scored.clear()
        xsd(*words, *more)
        assert len(scored) == num
    torch.manual_seed(1)
    checkpoint.save(build(configure("L4", 24, 32, SIZES)), Path("L4"))
    scored.clear()
    xsd(*words)
    assert len(scored) == 6


def test_shares_of_any_number_of_processes(tmp_path: Path) -> None:
    """Whoever kept a batch, it is found."""
    parts = {number: Scored(Counts(cycles=(number, 2)), (number, 7)) for number in range(5)}
    journal = Journal(tmp_path / "counts")
    assert journal.read() == {}
    for rank in range(2):
        with journal.writing(rank) as keep:
            for number in list(parts)[rank::2]:
                keep(number, parts[number])
    assert journal.read() == parts
    journal.remove()
    assert journal.read() == {} and not journal.folder.exists()


def many_answers(source: Path, target: Path, times: int) -> Path:
    """A store that says the same again and again, under other keys."""
    shutil.copytree(source, target)
    index = json.loads((target / "index.json").read_text())
    [chunk] = index["chunks"]
    index["chunks"] = []
    for number in range(times):
        samples = [
            {**sample, "key": sample["key"].replace("test_0000", f"test_{number:04}")}
            for sample in chunk["samples"]
        ]
        index["chunks"].append({**chunk, "samples": samples, "start_idx": 6 * number})
    (target / "index.json").write_text(json.dumps(signed(index)))
    return target


@pytest.mark.slow
def test_sigkill_at_random_moments(
    world: World, workplace: Path, words: list[str], scored: list[int]
) -> None:
    """Real processes; then one that is let live, and one that did it all."""
    data = many_answers(world.data / "chunked_test_1s_fp32", workplace / "data", 50)
    words[words.index("--data") + 1] = str(data)
    draw, out = random.Random(0), Path("out")
    for number in range(3):
        before, deadline = num_kept(out), time.monotonic() + PATIENCE_SECONDS
        process = subprocess.Popen(
            [sys.executable, "-m", "xsd", *words], env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        while num_kept(out) == before < 300 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.3) if number else 0.0)
        process.kill()
        assert process.wait() == -9, "it was over before it could be killed"
        assert num_kept(out) > before or before == 300
    kept = num_kept(out)
    xsd(*words)
    assert len(scored) == 300 - kept < 300 and journals(out) == []
    xsd(*words[:-1], "whole", "--rerun")
    assert files(out) == files(Path("whole")) and len(scored) == 600 - kept

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import World, drawn, tags, xsd
from xsd import bench
from xsd.decoding.decoded import Decoded
from xsd.files import read_json
from xsd.tracking import products
from xsd.types import Strategy

FIGURES = (
    "speedup_comparison",
    "timing_breakdown",
    "accept_rate_comparison",
    "accept_rate_by_depth",
    "prefill_hiding",
)


def test_trainings_are_found_in_a_folder_and_all_files_are_left(
    world: World, runs: Callable[..., list[Any]]
) -> None:
    """The folder that ``train`` fills serves as it is; of two trainings the newest counts."""
    xsd("train", *world.train_flags, "--num_epochs", 1)
    xsd("train", *world.train_flags, "--num_epochs", 1, "--seed", 1)
    newest = sorted(Path("outputs/train/L1").iterdir())[-1]
    given = ["--dataset_dir", world.scenes, "--adapter_dir", "outputs/train"]
    small = ["--max_samples", 2, "--max_questions", 3, "--max_new_tokens", 8]
    timing = ["--repeats", 1, "--warmup", 0, "--overlap", "inline", "--output_dir", "out"]
    words = [*world.pair_flags, *given, *small, *timing, "--configs", "vl_baseline,L1+VL"]
    xsd("benchmark", *words)
    [run] = runs("benchmark")
    assert tags(run)["input.adapter.L1"] == str(newest)
    # No control asks what the training answers were.
    assert "input.data" not in tags(run)
    assert tags(run)["lossless"] == "true" and run.data.metrics["measured.L1_VL.speedup"] > 0
    [folder] = Path("out").iterdir()
    names = {re.sub(r"_\d{8}_\d{6}", "", path.name) for path in folder.iterdir()}
    tables = {"e2e_wallclock.json", "e2e_wallclock.md"}
    assert {*tables, "benchmark.html"} <= names
    stamped = drawn(folder / "benchmark.html")
    assert [re.sub(r"_\d{8}_\d{6}", "", name) for name in stamped] == [*FIGURES]
    [text] = (path.read_text() for path in folder.glob("e2e_wallclock_*.md"))
    header = [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]
    assert header[:4] == ["Config", "Prefill", "Decode", "Total"]
    assert {"Accept", "Speedup", "Free Tokens"} <= set(header)
    note = tags(run)["mlflow.note.content"]
    assert re.match(r"benchmark: L1\+VL is \d\.\d\dx plain decoding; 1 of 1 configs keep", note)
    assert "| Config" in note
    shown = products.load(f"runs:/{run.info.run_id}").path / "tables/benchmark.json"
    assert json.loads(shown.read_text())["columns"][:3] == ["strategy", "speedup", "lossless"]
    [path] = folder.glob("e2e_wallclock_*.json")
    assert len(read_json(path)["traces"]) == 4
    assert "Strict" not in text and "strict_rows" not in tags(run)
    xsd("benchmark", *words, "--strict")
    strict = runs("benchmark")[0]
    # Eight drafts in the gap: one is the prefill's, and the token said before the rest is a row.
    assert tags(strict)["strict_rows"] == "8" and tags(strict)["lossless"] == "true"
    assert "every pass of decoding, plain or not, has 8 rows" in tags(strict)["mlflow.note.content"]


def test_samples_that_failed_are_told_of_where_they_are_allowed(
    world: World,
    runs: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode = bench.Bench.decode

    def broken(party: bench.Bench, item: bench.BenchItem, strategy: Strategy) -> Decoded:
        is_first = item is party.items[0]
        if strategy.name == "drafter+VL" or (strategy.name == "oracle" and is_first):
            raise RuntimeError("out of memory")
        return decode(party, item, strategy)

    monkeypatch.setattr(bench.Bench, "decode", broken)
    given = ["--dataset_dir", world.scenes, "--data", world.data, "--output_dir", "out"]
    small = ["--max_samples", 3, "--max_questions", 3, "--max_new_tokens", 8, "--repeats", 2]
    words = [*world.pair_flags, *given, *small, "--warmup", 0, "--overlap", "inline"]
    words += ["--configs", "oracle,ngram,drafter+VL"]
    xsd("benchmark", *words, expect=2)
    error = capsys.readouterr().err
    assert "drafter+VL lost 3 of 3 samples, more than --max_failures 0.02 allows" in error
    assert "RuntimeError: out of memory" in error
    xsd("benchmark", *words, "--max_failures", 1)
    run = runs("benchmark")[0]
    assert tags(run)["lossless"] == "unknown" and tags(run)["num_failures"] == "3"
    found = {
        name: run.data.metrics[f"measured.{name}.num_failed"]
        for name in ("vl_baseline", "oracle", "ngram", "drafter_VL")
    }
    assert list(found.values()) == [0, 1, 0, 3]
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.endswith(" |") and " of 3 " in line]
    assert [row[1] for row in rows] == ["3 of 3", "2 of 3", "3 of 3", "0 of 3"]


def test_batches_of_questions_about_one_clip(
    world: World, runs: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--dataset_dir", world.scenes, "--data", world.data, "--output_dir", "out"]
    small = ["--max_samples", 4, "--max_questions", 3, "--max_new_tokens", 8, "--repeats", 1]
    words = [*world.pair_flags, *given, *small, "--warmup", 0, "--batch_size", 3]
    xsd("benchmark", *words, "--configs", "ngram,oracle,drafter+VL")
    printed = capsys.readouterr().out
    assert "batches leave out drafter+VL: only heads that draft chains" in printed
    [run] = runs("benchmark")
    assert tags(run)["lossless"] == "true"
    assert run.data.metrics["measured.oracle.speedup_alone"] > 0
    [path] = Path("out").glob("*/e2e_wallclock_*.json")
    found = read_json(path)
    assert found["config"]["batch_size"] == "3"
    # Of four samples that were allowed, the three that share a clip.
    assert [trace["batch_size"] for trace in found["traces"]] == [3] * 9
    assert len({trace["sample_key"].rpartition("/q")[0] for trace in found["traces"]}) == 1
    header = printed[printed.index("| Config") :].splitlines()[0]
    assert header.endswith("| Tokens/s | Against one by one |")
    assert "Batch size 3: " in printed
    xsd("benchmark", *words, "--configs", "drafter+VL", expect=2)
    assert "--batch_size 3 with drafter+VL" in capsys.readouterr().err

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.commands.conftest import World, tags, xsd
from xsd.files import read_json

FIGURES = (
    "speedup_comparison",
    "timing_breakdown",
    "accept_rate_comparison",
    "prefill_hiding",
)


def test_trainings_are_found_in_a_folder_and_all_files_are_left(
    world: World, runs: Callable[..., list[Any]]
) -> None:
    """The folder that ``train`` fills serves as it is; of two trainings the newest counts."""
    xsd("train", *world.train_flags, "--num_epochs", 1)
    xsd("train", *world.train_flags, "--num_epochs", 1, "--seed", 1)
    newest = sorted(Path("outputs/train/L1").iterdir())[-1]
    given = ["--dataset_dir", world.scenes, "--data", world.data, "--adapter_dir", "outputs/train"]
    small = ["--max_samples", 2, "--max_questions", 3, "--max_new_tokens", 8]
    timing = ["--repeats", 1, "--warmup", 0, "--overlap", "inline", "--output_dir", "out"]
    words = [*world.pair_flags, *given, *small, *timing, "--configs", "vl_baseline,L1+VL"]
    xsd("benchmark", *words)
    [run] = runs("benchmark")
    assert tags(run)["input.adapter.L1"] == str(newest)
    assert tags(run)["lossless"] == "true" and run.data.metrics["measured.L1_VL.speedup"] > 0
    [folder] = Path("out").iterdir()
    names = {re.sub(r"_\d{8}_\d{6}", "", path.name) for path in folder.iterdir()}
    tables = {"e2e_wallclock.json", "e2e_wallclock.md"}
    assert {*tables, *(f"{name}.html" for name in FIGURES)} <= names
    [text] = (path.read_text() for path in folder.glob("e2e_wallclock_*.md"))
    header = [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]
    assert header[:4] == ["Config", "Prefill", "Decode", "Total"]
    assert {"Accept", "Speedup", "Free Tokens"} <= set(header)
    assert tags(run)["mlflow.note.content"].startswith("| Config")
    [path] = folder.glob("e2e_wallclock_*.json")
    assert len(read_json(path)["traces"]) == 4
    assert "Strict" not in text and "strict_rows" not in tags(run)
    xsd("benchmark", *words, "--strict")
    strict = runs("benchmark")[0]
    # Eight drafts in the gap: one is the prefill's, and the token said before the rest is a row.
    assert tags(strict)["strict_rows"] == "8" and tags(strict)["lossless"] == "true"
    assert "every pass of decoding, plain or not, has 8 rows" in tags(strict)["mlflow.note.content"]

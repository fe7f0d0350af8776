from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands.conftest import World, drawn, tags, xsd
from xsd.adapters import checkpoint
from xsd.adapters.catalog import build, configure, level
from xsd.adapters.config import AdapterSizes
from xsd.commands.offline import answer_lengths
from xsd.hidden import lm_head
from xsd.hidden.store import HiddenStore
from xsd.learning.batches import OrderedBatches
from xsd.metrics import score, score_batches

SIZES = AdapterSizes(num_heads=4, ffn_dim=16, bottleneck_dim=8, max_positions=16)
FILES = {
    *("acceptance_metrics.json", "position_stats.json", "METRICS_COMPARISON.md"),
    "evaluate.html",
}


@pytest.fixture
def evaluate(world: World, workplace: Path) -> Callable[..., Path]:
    """Evaluate a fresh adapter of a level; returns its folder."""

    def run(name: str, *words: object, expect: int = 0, **extra: str) -> Path:
        folder = workplace / name
        torch.manual_seed(0)
        checkpoint.save(build(configure(name, 24, 32, SIZES)), folder, extra=extra)
        given = ("--checkpoint", folder, "--data", world.data, "--lm_head", world.head)
        xsd("evaluate", *world.pair_flags, *given, *words, expect=expect)
        return folder

    return run


@pytest.mark.parametrize("name", ["L1", "X1", "L5F", "E3"])
def test_all_files_and_metrics(
    evaluate: Callable[..., Path],
    world: World,
    runs: Callable[..., list[Any]],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = evaluate(name, "--gamma_decode", "4", loss="token")
    assert {path.name for path in folder.iterdir()} >= FILES
    figures = drawn(folder / "evaluate.html")
    assert figures == ["metrics_summary", "token_metrics", "stage_timeline"]
    [run] = runs("evaluate")
    logged, row = run.data.metrics, level(name)
    written = json.loads((folder / "acceptance_metrics.json").read_text())
    for key in ("cos_sim_mean", "accept_90", "consecutive_mean_90", "token_top1_match"):
        assert logged[key] == pytest.approx(written[key])
    assert logged["accept_length"] == logged[row.selection_metric]
    assert logged["modelled.speedup_e2e"] > 0 and logged["num_samples"] <= 6
    assert ("same_position.accept_90" in logged) == row.same_position
    assert ("modelled.num_free" in logged) == (row.phase == "gap")
    assert run.info.run_name == f"evaluate {name}" and tags(run)["loss"] == "token"
    assert f"evaluate {name}: cos_sim" in capsys.readouterr().out
    text = (folder / "METRICS_COMPARISON.md").read_text()
    assert f"accept length ({row.selection_metric})" in text
    positions = json.loads((folder / "position_stats.json").read_text())
    assert positions["target"][0]["position"] == row.shift
    assert bool(positions["same_position"]) == row.same_position


def test_modelled_time_uses_each_answers_own_prefix(world: World) -> None:
    """Per-answer prefixes and the counted histogram are one thing."""
    store = HiddenStore.open(world.data / "chunked_test_1s_fp32")
    head, row = lm_head.load(world.head), level("L4")
    adapter = build(configure("L4", 24, 32, SIZES)).eval()
    batches = OrderedBatches(store, row, store.keys(), batch_size=4, head=head)
    scored = list(score_batches(adapter, batches, head.lm_head))
    accepted = np.array([number for part in scored for number in part.accepted])
    counts = score(adapter, batches, head.lm_head)
    assert np.bincount(accepted, minlength=23).tolist() == list(counts.prefix_histogram)
    lengths = answer_lengths(store, store.keys())
    assert (accepted <= lengths).all() and lengths.sum() == sum(counts.target.scored)


def test_a_trained_adapter_by_uri_and_the_newest_without_one(
    world: World, runs: Callable[..., list[Any]]
) -> None:
    xsd("train", *world.train_flags, "--level", "L2")
    [trained] = runs("train")
    data = ("--data", world.data, "--lm_head", world.head)
    xsd("evaluate", *world.pair_flags, *data, "--checkpoint", f"runs:/{trained.info.run_id}")
    xsd("evaluate", *world.pair_flags, *data, "--level", "2")
    inputs = {tags(run)["input.checkpoint"] for run in runs("evaluate")}
    assert inputs == {f"runs:/{trained.info.run_id}"}
    assert next(Path("outputs/evaluate").rglob("acceptance_metrics.json"))


def test_what_does_not_fit_is_refused(
    evaluate: Callable[..., Path], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate("L1", "--level", "L4", expect=2)
    assert "holds level L1, wanted L4" in capsys.readouterr().err
    evaluate("L1", "--pass_ms", "6=52", expect=2)
    assert "write rows:ms, such as 6:52,22:68" in capsys.readouterr().err
    evaluate("L1", "--data", world.data / "nowhere", expect=2)
    assert "no such file or folder" in capsys.readouterr().err


def test_costs_move_the_model_only(
    evaluate: Callable[..., Path], runs: Callable[..., list[Any]]
) -> None:
    evaluate("B1")
    evaluate("B1", "--pass_ms", "6:60")
    slow, fast = (run.data.metrics for run in runs("evaluate"))
    assert slow["modelled.decode_speedup"] < fast["modelled.decode_speedup"]
    assert slow["tau_6"] == fast["tau_6"]

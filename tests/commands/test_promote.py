from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.commands.conftest import World, tags, xsd
from xsd import bench
from xsd.adapters import checkpoint
from xsd.pairs.config import PairConfig
from xsd.tracking import products, registry, store

Runs = Callable[..., list[Any]]


@pytest.fixture
def train(world: World, workplace: Any, runs: Runs) -> Callable[..., str]:
    """Train and return the run's URI."""

    def run(*words: object) -> str:
        before = {run.info.run_id for run in runs("train")}
        # Heads draft a little beyond the longest answer.
        xsd("train", *world.train_flags, "--max_positions", 80, *words)
        [run_id] = {run.info.run_id for run in runs("train")} - before
        return f"runs:/{run_id}"

    return run


@pytest.fixture
def promote(world: World) -> Callable[..., None]:
    def run(candidate: str, *words: object, expect: int = 0) -> None:
        given = ["--candidate", candidate, "--dataset_dir", world.scenes, "--num_answers", 2]
        xsd("promote", *world.pair_flags, *given, *words, expect=expect)

    return run


def champion(world: World, level: str) -> Any:
    return registry.champion(world.pair.pair, level)


def newest(runs: Runs) -> Any:
    return max(runs("promote"), key=lambda run: run.info.start_time)


@pytest.mark.parametrize("level", ["L4", "E3"])
def test_the_first_is_promoted(
    world: World, train: Callable[..., str], promote: Callable[..., None], runs: Runs, level: str
) -> None:
    candidate = train("--level", level)
    promote(candidate)
    version = champion(world, level)
    assert version.tags["level"] == level and float(version.tags["accept_length"]) >= 0
    loaded = products.load(registry.champion_uri(world.pair.pair, level))
    checkpoint.load(loaded.path, expect_level=level)
    run = newest(runs)
    assert tags(run)["promoted"] == "true" and "reasons" not in tags(run)
    assert tags(run)["input.candidate"] == candidate


def test_the_same_accept_length_does_not_beat_it(
    world: World,
    train: Callable[..., str],
    promote: Callable[..., None],
    runs: Runs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    promote(train())
    first = champion(world, "L1")
    promote(train("--rerun"))
    assert champion(world, "L1").version == first.version
    refused = tags(newest(runs))
    assert refused["promoted"] == "false"
    assert "does not beat version 1's" in refused["reasons"]
    assert "refused (accepted_prefix_22" in capsys.readouterr().out


def test_better_weights_replace_the_incumbent(
    world: World,
    train: Callable[..., str],
    promote: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from xsd.commands import promote as module

    values = iter([1.0, 2.0, 1.0])
    monkeypatch.setattr(module._Gate, "_accept_length", lambda *_: next(values))
    promote(train())
    promote(train("--seed", 1))
    assert int(champion(world, "L1").version) == 2
    client = store.client()
    name = registry.model_name(world.pair.pair, "L1")
    assert int(client.get_model_version_by_alias(name, registry.PREVIOUS).version) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--level", "L4", "--attention", "bidirectional"], "sees the future"),
        (["--val_data", "TEST"], "chosen on test data"),
    ],
)
def test_refused_on_principle(
    world: World,
    train: Callable[..., str],
    promote: Callable[..., None],
    runs: Runs,
    words: list[str],
    reason: str,
) -> None:
    test = str(world.data / "chunked_test_1s_fp32")
    promote(train(*(test if word == "TEST" else word for word in words)))
    assert reason in tags(newest(runs))["reasons"]
    assert champion(world, "L4") is None and champion(world, "L1") is None


def test_altered_weights_are_refused(
    world: World, train: Callable[..., str], promote: Callable[..., None], runs: Runs
) -> None:
    candidate = train()
    kept = products.load(f"models:/{products.load(candidate).model_id}").path
    weights = kept / "best_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()  # it is a link to the run's own copy
    weights.write_bytes(content)
    promote(candidate)
    assert "altered" in tags(newest(runs))["reasons"]


def test_weights_that_are_not_finite_are_refused(
    world: World, train: Callable[..., str], promote: Callable[..., None], runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    candidate = train()
    original = checkpoint.load_file

    def poisoned(path: Any) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(x, torch.nan) for name, x in original(path).items()}

    monkeypatch.setattr(checkpoint, "load_file", poisoned)
    promote(candidate)
    assert "not finite" in tags(newest(runs))["reasons"]


def test_a_lossy_decode_is_refused(
    world: World,
    train: Callable[..., str],
    promote: Callable[..., None],
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def lossy(pair: Any, config: PairConfig, items: Any, strategy: Any, folder: Any) -> bool:
        asked.append((strategy.name, len(items)))
        return False

    monkeypatch.setattr(bench, "is_lossless", lossy)
    promote(train("--level", "E1"))
    assert asked == [("E1_decode", 2)]
    assert "E1_decode changed, or could not give, one of 2" in tags(newest(runs))["reasons"]


def test_a_path_is_no_candidate(
    train: Callable[..., str],
    promote: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    promote(str(products.load(train()).path), expect=2)
    assert "tracked run" in capsys.readouterr().err


def test_another_level_is_refused(
    train: Callable[..., str],
    promote: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    promote(train(), "--level", "L2", expect=2)
    assert "of level L1, not L2" in capsys.readouterr().err


def test_free_running_adapters_have_a_name_of_their_own() -> None:
    from xsd.commands.promote import _registered

    assert _registered({"level": "L4", "conditioning": "teacher_forced"}) == "L4"
    assert _registered({"level": "L4", "conditioning": "free_running"}) == "L4-free"

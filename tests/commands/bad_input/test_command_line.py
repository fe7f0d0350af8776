"""Slips in flags, recipes and the pipeline's plan."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.bad_input.conftest import Refused
from xsd.cli import COMMANDS
from xsd.pairs.config import PairConfig


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "unknown command"),
        ("train --num_epoch 3", "unknown flag --num_epoch, did you mean 'num_epochs'"),
        ("train --level", "flag --level needs a value"),
        ("train stray", "unexpected argument 'stray'"),
        ("train --level L9", "unknown level 'L9'; choose 1-6 or one of L1, "),
        ("train --level 7", "unknown level '7'"),
        ("evaluate --level 0", "unknown level '0'"),
        ("train --loss mse", "--loss: 'mse' is not one of feature, token or null"),
        ("train --num_epochs 0", "num_epochs=0: must be at least 1"),
        ("train --num_epochs many", "--num_epochs: 'many' is not int"),
        ("train --learning_rate nan", "--learning_rate: 'nan' is not float"),
        ("train --batch_size -4", "batch_size=-4: must be at least 1"),
        ("train --seed -1", "seed=-1: must not be negative"),
        ("train --num_event_images 0", "--num_event_images 0: must be at least 1"),
        ("train --bottleneck_dim -3", "bottleneck_dim=-3: must be at least 1"),
        ("train --num_heads 0", "num_heads=0: must be at least 1"),
        ("sweep --num_trials 0", "num_trials=0: must be at least 1"),
        ("sweep --dropout 2", "dropout=2.0: must be at least 0 and below 1"),
        ("extract --max_samples 0", "max_samples=0: must be at least 1, or -1 for all"),
        ("extract --split val", "--split: 'val' is not one of all, train, test"),
        ("scenes --num_train -1", "num_train, num_val and num_test must not be negative"),
        ("scenes --size 7", "size even and at least 32"),
        ("scenes --event_camera.noise_rate_hz -1", "noise_rate_hz=-1.0: must not be negative"),
        ("scenes --event_camera.contrast_threshold 0", "must be above 0"),
        ("evaluate --gamma 0", "gamma=0: must be at least 1"),
        ("evaluate --pass_ms a:b", "write rows:ms, such as 6:52,22:68"),
        ("evaluate --verifier_slowdown 0.9", "verifier_slowdown=0.9: must be at least 1"),
        ("two_phase --drafter_slowdown 0", "drafter_slowdown=0.0: must be at least 1"),
        ("benchmark --configs L9+VL", "config 'L9+VL' is unknown; known: vl_baseline, "),
        ("benchmark --configs synthetic:2", "every rate must be between 0 and 1"),
        ("benchmark --configs X1+synthetic:high", "write synthetic:0.8"),
        ("benchmark --configs synthetic:none.json", "config synthetic:none.json"),
        ("benchmark --pair nope", "unknown pair 'nope'; choose one of tiny"),
        ("generate --pair nope", "unknown pair 'nope'; choose one of tiny"),
        ("benchmark --gamma 0", "gamma=0: must be at least 1"),
        ("benchmark --max_samples 0", "max_samples=0: must be at least 1, or -1 for all"),
        ("benchmark --repeats 0", "repeats=0: must be at least 1"),
        ("benchmark --warmup -1", "warmup=-1: must not be negative"),
        ("benchmark --max_new_tokens 0", "max_new_tokens=0: must be at least 1"),
        ("promote --num_answers 0", "num_answers=0: must be at least 1"),
        ("levels --dim 7", "must be a positive multiple of the 8 attention heads"),
    ],
)
def test_a_slip_in_the_command_line(refused: Refused, words: str, message: str) -> None:
    assert message in refused(*words.split())


def test_an_unknown_precision_is_refused_by_every_command_that_loads_a_pair(
    refused: Refused,
) -> None:
    modules = {command: importlib.import_module(path) for command, path in COMMANDS.items()}
    takers = [name for name, found in modules.items() if issubclass(found.Config, PairConfig)]
    assert {"extract", "train", "benchmark", "generate"} <= set(takers)
    for command in takers:
        line = refused(command, "--quant", "3bit")
        assert "--quant 3bit: choose one of 4bit, 8bit, fp16, bf16, fp32" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train: [open", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"- train", "a recipe is a mapping of sections"),
        (b"trian: {}", "unknown section or shared key 'trian'"),
        (b"train: 3", "section 'train' must be a mapping"),
        (b"train: []", "section 'train' must be a mapping"),
        (b"train: {num_epoch: 3}", "unknown key 'num_epoch', did you mean 'num_epochs'?"),
        (b"train: {num_epochs: many}", "num_epochs: 'many' is not int"),
        (b"train: {level: 9}", "unknown level 9"),
        (b"train.L9: {num_epochs: 3}", "unknown level 'L9'"),
        (b"seed: abc", "seed: 'abc' is not int"),
        (b"benchmark: {warm: 3}", "section 'benchmark': unknown key 'warm'"),
    ],
)
def test_a_slip_in_a_recipe(refused: Refused, text: bytes, message: str) -> None:
    Path("recipe.yaml").write_bytes(text)
    line = refused("train", "--config", "recipe.yaml")
    assert message in line and ("recipe.yaml" in line or "level" in message)


def test_a_recipe_that_is_not_there(refused: Refused) -> None:
    assert "nope.yaml: cannot be read (No such file" in refused("train", "--config", "nope.yaml")
    assert "cannot be read (Is a directory)" in refused("train", "--config", ".")
    assert "nope.yaml: no such recipe" in refused("main", "--recipe", "nope.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--levels L1,L9", "unknown level 'L9'"),
        ("--levels L4:fast", "--levels L4:fast: a level is followed by nothing, :feature or :free"),
        ("--levels ,", "names no level to train"),
        ("--levels L4 --two_phase L4+L5F", "--two_phase L4+L5F: write GAP+HEAD, both of them"),
    ],
)
def test_the_pipeline_checks_its_plan_before_the_first_stage(
    refused: Refused, flags: str, message: str
) -> None:
    Path("recipe.yaml").write_text("seed: 0\n")
    assert message in refused("main", "--recipe", "recipe.yaml", *flags.split())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quant: 3bit", "--quant 3bit: choose one of 4bit, "),
        ("benchmark: {warmup: -1}", "warmup=-1: must not be negative"),
    ],
)
def test_the_pipeline_checks_its_recipe_before_the_first_stage(
    refused: Refused, runs: Callable[..., list[Any]], recipe: str, message: str
) -> None:
    Path("recipe.yaml").write_text(recipe)
    assert message in refused("main", "--recipe", "recipe.yaml")
    assert runs("scenes") == []


def test_a_checkpoint_that_is_not_named_costs_nothing(
    refused: Refused, runs: Callable[..., list[Any]]
) -> None:
    pair = ["--pair", "eventgpt-video-llava"]
    Path("recipe.yaml").write_text("seed: 0\n")
    for words in (["extract"], ["benchmark"], ["main", "--recipe", "recipe.yaml"]):
        assert "needs --drafter" in refused(*words, *pair)
    assert runs("scenes") == []


def test_an_unknown_pair_costs_nothing(refused: Refused, runs: Callable[..., list[Any]]) -> None:
    for stage in ("lm_head", "extract", "train"):
        assert "unknown pair 'huge'" in refused(stage, "--pair", "huge")
    assert runs("scenes") == []

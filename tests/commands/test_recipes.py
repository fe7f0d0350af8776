"""The recipes of experiments/: all of them parse, to the last key, and say what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands.conftest import World, tags, xsd
from xsd import cli
from xsd.adapters.catalog import LEVELS
from xsd.cli import STAGES
from xsd.cli.seed_flags import SEED_FLAGS
from xsd.commands import sweep
from xsd.config import Level, parse
from xsd.search.space import read_space

FOLDER = Path(__file__).parents[2] / "experiments"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SPACES = [name for name in NAMES if name.startswith("sweep")]
RECIPES = [name for name in NAMES if name not in SPACES]


def settings(name: str, stage: str, *words: str) -> Any:
    config_class = cli.section_class(stage)
    assert config_class is not None
    argv = ["--config", str(FOLDER / name), *words]
    return parse(config_class, argv, prog=f"xsd {stage}", sections=cli.section_class)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_nothing_unknown(name: str) -> None:
    for stage in STAGES:
        settings(name, stage)
    for level in LEVELS:
        assert settings(name, "train", "--level", level).level == level


@pytest.mark.parametrize("name", NAMES)
def test_each_names_its_command_its_cost_and_what_to_expect(name: str) -> None:
    head = (FOLDER / name).read_text().split("\n\n")[0]
    lines = [line for line in head.splitlines() if line.startswith("#")]
    assert any(line.startswith(("#   mlflow run", "#   xsd")) or "XSD_" in line for line in lines)
    assert any(line.startswith("# Cost") for line in lines)
    assert any(line.startswith("# Expect") for line in lines) or name == "lab.yaml"


@pytest.mark.parametrize("name", SPACES)
def test_spaces_search_options_of_training(name: str) -> None:
    space = read_space(FOLDER / name, sweep._searchable())
    for level in LEVELS:
        for parameter, distribution in space.items():
            value = distribution.to_external_repr(_lowest(distribution))
            given = [f"--{parameter}", str(value), "--level", level]
            assert getattr(settings("tiny.yaml", "sweep", *given), parameter) == value


def _lowest(distribution: Any) -> Any:
    return 0 if hasattr(distribution, "choices") else distribution.low


def test_spaces_cover_what_can_be_searched() -> None:
    searched = {key for name in SPACES for key in yaml.safe_load((FOLDER / name).read_text())}
    assert {"learning_rate", "weight_decay", "warmup_steps", "max_norm", "batch_size"} <= searched
    assert {"bottleneck_dim", "num_blocks", "num_heads", "num_layers", "ffn_dim"} <= searched
    assert {"loss", "conditioning", "unroll_steps", "dropout"} <= searched


@pytest.mark.parametrize(
    ("level", "name"),
    [("L2", "bottleneck"), ("L4", "gap"), ("X1", "x1"), ("E3", "decode"), ("text", "decode")],
)
def test_every_level_has_a_space(level: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsd.tracking.store.project_root", lambda: FOLDER.parent)
    config = sweep.Config(level=Level(level))
    assert sweep._space_file(config) == FOLDER / f"sweep_{name}.yaml"


def test_the_seeds_recipe_has_the_published_settings() -> None:
    """Of every flag that it sets the published default, of levels the published commands."""
    recipe = yaml.safe_load((FOLDER / "seed.yaml").read_text())
    compared = 0
    for flag in SEED_FLAGS:
        section = recipe.get(flag.stage, {})
        if flag.ours in section and flag.default is not None and flag.ours != "configs":
            assert section[flag.ours] == flag.default, flag
            compared += 1
    assert compared >= 15
    longer = {name: settings("seed.yaml", "train", "--level", name) for name in LEVELS}
    assert (longer["L4"].num_epochs, longer["L4"].early_stopping) == (300, 50)
    assert longer["L5"].num_epochs == longer["L5F"].num_epochs == 100
    assert longer["B1"].num_epochs == longer["L1"].num_epochs == 50
    assert longer["L3"].conditioning == "free_running" and longer["L3"].loss is None


def test_shapes_alone_are_measured(world: World, runs: Callable[..., list[Any]]) -> None:
    """At miniature shapes: with drawn weights, from no checkpoint, to a table of speeds."""
    shapes = ["--config", FOLDER / "shapes.yaml", "--device", "cpu", "--quant", "fp32"]
    folders = ["--drafter", world.pair.drafter, "--verifier", world.pair.verifier]
    given = [*shapes, *folders, "--dataset_dir", world.scenes]
    xsd("extract", *given, "--max_new_tokens", 8)
    small = ["--max_samples", 2, "--max_new_tokens", 8, "--repeats", 1, "--warmup", 0]
    xsd("benchmark", *given, *small, "--overlap", "inline")
    [run] = runs("benchmark")
    assert tags(run)["lossless"] == "true"
    assert run.data.metrics["measured.synthetic_0.8.speedup"] > 0
    assert run.data.params["cfg.weights"] == "random"

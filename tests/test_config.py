from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from xsd.config import LEVELS, Level, parse, resolved
from xsd.errors import XsdError


@dataclass(frozen=True)
class Lens:
    focus: float = 1.0
    """Metres."""


@dataclass(frozen=True)
class Shared:
    pair: str = "tiny"
    seed: int = 0
    """Of all random numbers."""


@dataclass(frozen=True)
class Train(Shared):
    level: Level = Level("L1")
    learning_rate: float = 1e-3
    strict: bool = False
    early_stopping: int | None = 10
    data: Path | None = None
    quant: Literal["4bit", "fp16"] = "4bit"
    levels: tuple[Level, ...] = ()
    names: tuple[str, ...] | None = None
    lens: Lens = field(default_factory=Lens)

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError("learning_rate: must not be\nnegative")


def read(*argv: str) -> Train:
    return parse(Train, argv, prog="xsd train", sections={"train": Train, "scenes": Shared}.get)


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_override_the_recipe_which_overrides_defaults(recipe) -> None:
    path = recipe("pair: real\nseed: 3\ntrain:\n  learning_rate: 1e-4\n  quant: fp16\n")
    config = read("--config", path, "--quant", "4bit")
    assert (config.pair, config.seed) == ("real", 3)
    assert config.learning_rate == 1e-4
    assert config.quant == "4bit"
    assert config.early_stopping == 10


def test_a_level_has_its_own_section(recipe) -> None:
    path = recipe("train: {learning_rate: 1, strict: true}\ntrain.L4: {learning_rate: 4}\n")
    assert read("--config", path, "--level", "4").learning_rate == 4
    assert read("--config", path, "--level", "4").strict
    assert read("--config", path).learning_rate == 1


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--strict"], "strict", True),
        (["--strict", "--seed", "1"], "strict", True),
        (["--strict", "false"], "strict", False),
        (["--strict=true"], "strict", True),
        (["--learning-rate", "2e-5"], "learning_rate", 2e-5),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--seed", "-1"], "seed", -1),
        (["--early_stopping", "null"], "early_stopping", None),
        (["--seed", "null"], "seed", 0),
        (["--config", "null"], "seed", 0),
        (["--levels", "1,l5f,X1"], "levels", ("L1", "L5F", "X1")),
        (["--levels", "[4]"], "levels", ("L4",)),
        (["--names", "vl_baseline,L4+VL"], "names", ("vl_baseline", "L4+VL")),
        (["--data", "a b/c"], "data", Path("a b/c")),
        (["--level", "6"], "level", "L5F"),
        (["--lens.focus", "2"], "lens", Lens(2.0)),
    ],
)
def test_flag_values(argv: list[str], name: str, value: object) -> None:
    assert getattr(read(*argv), name) == value


def test_null_in_mlproject_leaves_the_choice_to_the_recipe(recipe) -> None:
    path = recipe("train: {data: chunks, level: 4}")
    config = read("--config", path, "--data", "null", "--level", "null")
    assert (config.data, config.level) == (Path("chunks"), "L4")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sed", "1"], "unknown flag --sed, did you mean 'seed'?"),
        (["--seed", "x"], "--seed: 'x' is not int"),
        (["--seed"], "--seed needs a value"),
        (["--level", "7"], "unknown level '7'; choose 1-6 or one of L1"),
        (["--levels", "1,L9"], "unknown level 'L9'"),
        (["--quant", "5bit"], "--quant: '5bit' is not one of 4bit, fp16"),
        (["--strict", "maybe"], "unexpected argument 'maybe'"),
        (["--early_stopping", "1.5"], "--early_stopping: '1.5' is not int or null"),
        (["--lens.focus", "x"], "--lens.focus: 'x' is not float"),
        (["--learning_rate", "-1"], "learning_rate: must not be negative"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read (No such file"),
    ],
)
def test_a_wrong_flag_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(XsdError) as caught:
        read(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", "section 'train': unknown key 'learning_rat', did you mean"),
        ("trian: {seed: 1}", "unknown section or shared key 'trian'"),
        ("learning_rate: 1", "unknown section or shared key 'learning_rate'"),
        ("scenes: {learning_rate: 1}", "section 'scenes': unknown key 'learning_rate'"),
        ("train: {lens: {focos: 1}}", "section 'train.lens': unknown key 'focos'"),
        ("train.L9: {seed: 1}", "unknown level 'L9'"),
        ("train: {seed: x}", "recipe.yaml: seed: 'x' is not int"),
        ("train: 3", "section 'train' must be a mapping"),
        ("[1, 2]", "a recipe is a mapping"),
        ("train: {seed: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line(recipe, text: str, message: str) -> None:
    with pytest.raises(XsdError) as caught:
        read("--config", recipe(text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["4", 4, "L4", "l4", " L4 "])
def test_spellings_of_a_level(value: str | int) -> None:
    assert Level(value) == "L4"


def test_seed_numbers() -> None:
    assert [Level(number) for number in range(1, 7)] == ["L1", "L2", "L3", "L4", "L5", "L5F"]
    assert [Level(name) for name in LEVELS] == list(LEVELS)


def test_resolved_is_flat_and_scalar() -> None:
    values = resolved(read("--names", "a,b", "--data", "x"))
    assert values["names"] == '["a", "b"]'
    assert values["data"] == "x"
    assert values["level"] == "L1"
    assert values["lens.focus"] == 1.0
    assert resolved(Train())["data"] == "null"


def test_help_shows_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        read("--help")
    assert leaving.value.code == 0
    assert "Of all random numbers." in capsys.readouterr().out


def test_importing_it_loads_no_library() -> None:
    code = "import xsd.config, sys; print({'yaml', 'jsonargparse', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

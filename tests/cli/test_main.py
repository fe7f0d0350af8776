from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

from xsd import cli
from xsd.config import Level
from xsd.errors import XsdError

HEAVY = "{'torch', 'mlflow', 'transformers', 'optuna', 'plotly', 'av', 'numpy', 'pandas'}"


@dataclass(frozen=True)
class Config:
    level: Level = Level("L1")
    max_samples: int | None = None
    seed: int = 0


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Put a double in the place of ``xsd train``; returns what it was run with."""
    ran: list[Config] = []
    module = types.ModuleType("train_double")
    module.HELP, module.Config, module.run = "A double.", Config, ran.append
    monkeypatch.setitem(sys.modules, "train_double", module)
    monkeypatch.setitem(cli.COMMANDS, "train", "train_double")
    return ran


def test_a_command_is_run_with_its_configuration(train: list[Config]) -> None:
    assert cli.main(["train", "--adapter_level", "4", "--seed", "7"]) == 0
    assert train == [Config(level=Level("L4"), seed=7)]


def test_a_module_runs_the_same(train: list[Config]) -> None:
    assert cli.main(["--seed", "7"], command="train") == 0
    assert train == [Config(seed=7)]


def test_seed_flags_are_told_about_once(
    train: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--chunked", "--chunked", "--adapter_level", "5", "--vlm_only"]
    assert cli.main(words) == 0
    assert capsys.readouterr().err.count("always on") == 1
    assert train[0].level == "B1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--sed", "1"], "xsd train: error: unknown flag --sed"),
        (["trian"], "xsd trian: error: unknown command; choose one of scenes"),
        (["train", "--vlm_only"], "xsd train: error: --vlm_only belongs to level 5"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    train: list[Config], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert train == []


@pytest.mark.parametrize(
    ("error", "code"), [(XsdError("a\nb"), 2), (KeyboardInterrupt(), 130), (SystemExit(143), 143)]
)
def test_exit_codes(train: list[Config], error: BaseException, code: int) -> None:
    def fail(config: Config) -> None:
        raise error

    sys.modules["train_double"].run = fail  # type: ignore[attr-defined]
    assert cli.main(["train"]) == code


def test_a_defect_is_not_dressed_up(train: list[Config]) -> None:
    def fail(config: Config) -> None:
        raise ZeroDivisionError

    sys.modules["train_double"].run = fail  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_is_light(command: str) -> None:
    """Heavy libraries are what would make it slow: none may be loaded."""
    words = [command, "--help"] if command else ["--help"]
    code = (
        "import sys; from xsd.cli import main; code = main(sys.argv[1:]);"
        f"print(code, {HEAVY} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 set()"


@pytest.mark.parametrize("stage", cli.STAGES)
def test_a_stage_is_also_a_module(stage: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"xsd.commands.{stage}", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"usage: xsd {stage}")

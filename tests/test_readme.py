"""Every command of the README is one that exists, with flags that parse."""

from __future__ import annotations

import importlib
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from xsd.cli import COMMANDS, spelled
from xsd.config import parse

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS_SHOWN = [line for line in LINES if line and not line.startswith("#")]


def _parses(command: str, words: list[str]) -> None:
    words, _ = spelled(command, words)
    parse(importlib.import_module(COMMANDS[command]).Config, words, prog=f"xsd {command}")


def test_there_are_commands() -> None:
    assert len(COMMANDS_SHOWN) > 8
    assert COMMANDS_SHOWN[0].startswith("make demo")
    assert "mlflow run . -e train -P level=4" in COMMANDS_SHOWN


@pytest.mark.parametrize("line", COMMANDS_SHOWN)
def test_command_of_the_readme(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    elif words[0] == "xsd":
        _parses(words[1], words[2:])
    elif words[:3] == ["mlflow", "run", "."]:
        project = yaml.safe_load((ROOT / "MLproject").read_text())
        entry = words[words.index("-e") + 1] if "-e" in words else "main"
        assert entry in project["entry_points"]
        given = [word for before, word in pairwise(words) if before == "-P"]
        _parses(entry, [f"--{pair}" for pair in given])
    else:
        assert words[:2] == ["mlflow", "ui"], f"nobody checks {words[0]!r}"

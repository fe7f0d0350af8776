"""What bad input is told with: a command that must refuse, and things to be damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import World, xsd
from xsd.cli import main

Refused = Callable[..., str]
Damage = Callable[[Path], None]


@pytest.fixture
def refused(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must refuse; returns its one line.

    Progress that was shown before does not count. What stands in the folder afterwards stood there
    before, or is hidden, or is an index that says of itself that it is unfinished.
    """

    def run(*words: object) -> str:
        before = set(_visible(workplace))
        capfd.readouterr()
        code = main([str(word) for word in words])
        shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in shown if "error" in line.lower()]
        assert code == 2, shown
        assert len(lines) == 1 and "Traceback" not in "\n".join(shown), shown
        assert lines[0].startswith(f"xsd {words[0]}: error: ")
        left = [path for path in _visible(workplace) if path not in before]
        assert all(_is_unfinished(path) for path in left), left
        return lines[0]

    return run


def _visible(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return [p for p in found if not any(part.startswith(".") for part in p.parts)]


def _is_unfinished(path: Path) -> bool:
    return path.name == "index.json" and json.loads(path.read_text())["complete"] is False


@pytest.fixture
def scenes(world: World, workplace: Path) -> Path:
    """A copy of the scenes, to be damaged, whose event images have to be rendered."""
    shutil.copytree(world.scenes, "scenes")
    shutil.rmtree("scenes/event_image")
    return Path("scenes")


@pytest.fixture
def data(world: World, workplace: Path) -> Path:
    shutil.copytree(world.data, "data")
    return Path("data")


@pytest.fixture
def trained(world: World, workplace: Path) -> Path:
    """A checkpoint of level L1, to be damaged."""
    xsd("train", *world.train_flags, "--num_epochs", 1)
    [folder] = Path("outputs/train/L1").iterdir()
    return folder.rename("checkpoint")


def extract(world: World, scenes: Path, *more: object) -> list[object]:
    asked = ["--max_questions", 1, "--max_new_tokens", 4, "--batch_clips", 2, "--split", "train"]
    given = ["--dataset_dir", scenes, "--output_dir", "hidden"]
    return ["extract", *world.pair_flags, *given, *asked, *more]


def train(world: World, data: Path, *more: object) -> list[object]:
    return ["train", *world.train_flags, "--num_epochs", 1, "--data", data, *more]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("hostile_code_ran",)

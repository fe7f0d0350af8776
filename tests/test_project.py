"""The files around the package agree with each other."""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from xsd import __version__
from xsd.cli import COMMANDS, STAGES
from xsd.config import parse

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_version() -> None:
    assert PROJECT["version"] == __version__


def test_constraints_pin_every_requirement_within_its_bounds() -> None:
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    wanted = requirements(lines)
    assert set(pins()) == set(wanted)
    for name, version in pins().items():
        assert wanted[name].specifier.contains(version), name


def test_conda_agrees() -> None:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    python, _, nested = conda["dependencies"]
    lowest = PROJECT["requires-python"].removeprefix(">=")
    # A patch release: "3.11" alone sends pyenv to build the newest.
    assert python.startswith(f"python={lowest}.")
    here, there = requirements(PROJECT["dependencies"]), requirements(nested["pip"])
    assert set(here) == set(there)
    for name, requirement in there.items():
        assert str(requirement.specifier) == f"=={pins()[name]}"
        assert requirement.extras == here[name].extras


def test_plugins_are_declared_and_load() -> None:
    for group in ("mlflow.run_context_provider", "mlflow.default_experiment_provider"):
        (declared,) = (point for point in entry_points(group=group) if point.name == "xsd")
        assert declared.load()


def test_mlproject_has_an_entry_point_a_stage() -> None:
    assert set(ENTRY_POINTS) == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_mlproject_passes_flags_that_exist(stage: str) -> None:
    entry = ENTRY_POINTS[stage]
    words = entry["command"].split()
    assert words[:3] == ["python", "-m", f"xsd.commands.{stage}"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert flags == {f"--{name}": f"{{{name}}}" for name in entry["parameters"]}
    config_class = importlib.import_module(COMMANDS[stage]).Config
    argv = [word for flag in flags for word in (flag, "null")]
    assert parse(config_class, argv, prog=f"xsd {stage}") == config_class()


def test_no_machine_or_registry_is_named() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    host = re.compile("pythonhosted" + r"\.org|pypi" + r"\.org|index-" + "url")
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix in {".py", ".toml", ".txt", ".yaml", ".md", ""} and path.is_file():
            assert not host.search(path.read_text(encoding="utf-8")), name

from __future__ import annotations

from pathlib import Path

import pytest

from xsd.commands.sweep import _searchable
from xsd.errors import XsdError
from xsd.search.space import choices, read_space

SPACE = """
learning_rate: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}
num_layers: {type: int, low: 1, high: 3}
loss: {type: categorical, choices: [token, feature]}
"""
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = ("learning_rate", "num_layers", "loss")


def test_space_is_read(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    space = read_space(tmp_path / "space.yaml", NAMES)
    assert list(space) == list(NAMES)
    assert space["learning_rate"].log  # type: ignore[attr-defined]
    assert choices(space, "loss") == ("token", "feature")
    assert choices(space, "num_layers") == choices(space, "dropout") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth: {type: int, low: 1, high: 2}", "depth"),
        ("num_layers: {type: whole, low: 1, high: 2}", "float, int, categorical"),
        ("num_layers: 3", "float, int, categorical"),
        ("num_layers: {type: int, low: 3, high: 1}", "num_layers"),
        ("num_layers: {type: int, lo: 3, high: 1}", "num_layers"),
        ("loss: {type: categorical, choices: []}", "loss"),
        ("- a", "maps names"),
        ("{", "YAML"),
        ("", "maps names"),
    ],
)
def test_bad_space_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(XsdError, match=message):
        read_space(path, NAMES)


def test_missing_space(tmp_path: Path) -> None:
    with pytest.raises(XsdError, match="--space"):
        read_space(tmp_path / "none.yaml", NAMES)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("sweep*.yaml")), ids=lambda p: p.name)
def test_shipped_spaces_are_options_of_training(path: Path) -> None:
    assert read_space(path, _searchable())

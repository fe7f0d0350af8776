"""Chunks and heads that were damaged or do not fit, and a loss that is not finite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.bad_input.conftest import Damage, Hostile, Refused, cut, train
from tests.commands.conftest import World
from xsd.files import write_json


def _altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("level", "files", "damage", "message"),
    [
        ("L1", "chunks", cut, "it was cut off or altered"),
        ("L1", "chunks", _altered, "its sha256 is not the index's; it was altered"),
        ("L1", "chunks", Path.unlink, "missing, though the index names it"),
        ("X1", "visual", cut, "it was cut off or altered"),
        ("E3", "visual", _altered, "its sha256 is not the index's; it was altered"),
    ],
)
def test_a_chunk_that_was_damaged(
    world: World,
    refused: Refused,
    data: Path,
    level: str,
    files: str,
    damage: Damage,
    message: str,
) -> None:
    for path in sorted(data.glob(f"chunked_train*/{files}/*")):
        damage(path)
    assert message in refused(*train(world, data, "--level", level))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": None}, "not an index of hidden states"),
        ({"complete": False}, "its extraction was interrupted; run it again"),
        ("outside", "leaves the folder; remove it from the index"),
    ],
)
def test_an_index_of_chunks_is_not_trusted(
    world: World, refused: Refused, data: Path, change: Any, message: str
) -> None:
    [path] = data.glob("chunked_train*/index.json")
    index = json.loads(path.read_text())
    if change == "outside":
        index["chunks"][0]["path"] = "../../../../etc/passwd"
    else:
        index.update(change)
    write_json(path, index)
    assert message in refused(*train(world, data))


def test_data_that_are_none(world: World, refused: Refused) -> None:
    Path("empty").mkdir()
    Path("junk.pt").write_bytes(b"junk")
    torch.save({"egpt_hidden": Hostile()}, "hostile.pt")
    assert "no such file or folder" in refused(*train(world, Path("nope")))
    assert "no hidden states of the train split" in refused(*train(world, Path("empty")))
    for name in ("junk.pt", "hostile.pt"):
        assert "not a chunk of hidden states" in refused(*train(world, Path(name)))
    assert not Path("hostile_code_ran").exists()
    assert "no such file or folder" in refused(*train(world, world.data, "--val_data", "nope"))


def test_a_head_of_another_verifier(world: World, refused: Refused, trained: Path) -> None:
    shutil.copytree(world.head, "head")
    cut(Path("head/lm_head.safetensors"))
    assert "missing or altered" in refused(*train(world, world.data, "--lm_head", "head"))
    assert "no LM head; make one" in refused(*train(world, world.data, "--lm_head", trained))


def test_a_loss_that_is_not_finite(
    world: World, refused: Refused, runs: Callable[..., list[Any]]
) -> None:
    """In training, or, if the first step is the last one, in validation."""
    for epochs in (1, 3):
        line = refused(*train(world, world.data, "--learning_rate", 1e30, "--num_epochs", epochs))
        assert "became nan in epoch 0" in line and "lower --learning_rate" in line
    assert runs("train") == []

"""Chunks and heads that were damaged or do not fit, and a loss that is not finite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.bad_input.conftest import Damage, Hostile, Refused, cut, train
from tests.commands.conftest import World
from xsd.files import sha256_file, write_json
from xsd.hidden.index import signed


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


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_states_that_are_not_finite(
    world: World, refused: Refused, data: Path, trained: Path, value: str
) -> None:
    """Whatever wrote them: their checksums are right."""
    for folder in data.glob("chunked_*"):
        index = json.loads((folder / "index.json").read_text())
        for entry in index["chunks"]:
            path = folder / "chunks" / entry["path"]
            tensors = {name: x.clone() for name, x in load_file(path).items()}
            tensors["verifier_hidden"][0, 0] = float(value)
            save_file(tensors, path)
            entry.update(sha256=sha256_file(path), num_bytes=path.stat().st_size)
        write_json(folder / "index.json", signed(index))
    assert "the loss became" in refused(*train(world, data))
    given = ["--checkpoint", trained, "--lm_head", world.head]
    line = refused("evaluate", *given, "--data", next(data.glob("chunked_test*")))
    assert "holds states that are not finite; 'xsd store verify' names them" in line


def _first(index: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = index["chunks"][0]["samples"][0]
    return found


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another width": lambda index: index.update(d_drafter=7),
    "no width": lambda index: index.update(d_verifier="wide"),
    "no size": lambda index: index["chunks"][0].update(num_bytes="many"),
    "no vocabulary": lambda index: index["config"].update(vocab_size="many"),
    "no configuration": lambda index: index.update(config=None),
    "another length": lambda index: _first(index).update(verifier_len=99),
    "an empty answer": lambda index: _first(index).update(verifier_len=0),
    "a key twice": lambda i: _first(i).update(key=i["chunks"][0]["samples"][1]["key"]),
    "a key out of its folder": lambda i: _first(i).update(key="../../../x/q0"),
    "no split": lambda index: _first(index).update(split="dev"),
    "another format": lambda index: index.update(chunk_format="pickle"),
    "an answer less": lambda index: index["chunks"][0]["samples"].pop(),
    "no chunks": lambda index: index["chunks"].clear(),
    "visual states elsewhere": lambda i: i["visual"][0].update(path="../../../../etc/passwd"),
    "no path": lambda index: index["visual"][0].update(path=4),
    "a clip less": lambda index: index["visual"][0]["scenes"].pop(),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_index_that_was_edited(world: World, refused: Refused, data: Path, name: str) -> None:
    """E3 reads everything that a store holds."""
    [path] = data.glob("chunked_train*/index.json")
    index = json.loads(path.read_text())
    EDITS[name](index)
    write_json(path, signed(index))
    line = refused(*train(world, data, "--level", "E3"))
    assert "chunked_train" in line


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
    write_json(path, signed(index))
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

"""Media and indices of scenes that cannot be read or trusted, and splits that are empty."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands.bad_input.conftest import Damage, Hostile, Refused, cut, extract, train
from tests.commands.conftest import World, xsd
from xsd.errors import XsdError
from xsd.files import write_json
from xsd.hidden.index import signed
from xsd.hidden.store import HiddenStore
from xsd.scenes.layout import INDEX_NAME

COUNT = np.arange(50)
GOOD: dict[str, Any] = {
    "x": COUNT.astype(np.uint16),
    "y": COUNT.astype(np.uint16),
    "t": COUNT.astype(np.uint32),
    "p": (COUNT % 2).astype(np.uint8),
}


def _events(**changes: object) -> Damage:
    kept = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}

    def write(path: Path) -> None:
        np.save(path, np.array(kept, dtype=object), allow_pickle=True)

    return write


@pytest.mark.parametrize(
    ("files", "damage", "message"),
    [
        ("event_npy", Path.unlink, "cannot be read (No such file or directory); check the path"),
        ("event_npy", _events(x=Hostile()), "not an event file (it names posix.mkdir"),
        ("event_npy", _events(t=None, time=GOOD["t"]), "no t among the keys"),
        ("event_npy", _events(**{key: GOOD[key][:0] for key in GOOD}), "it holds no events"),
        ("event_npy", _events(y=GOOD["y"][:9]), "x, y, t, p differ in length: [50, 9, 50, 50]"),
        ("event_npy", _events(**{key: GOOD[key][:3] for key in GOOD}), "3 events cannot fill 5"),
        ("event_npy", cut, "not an event file"),
        ("mp4", Path.unlink, "cannot be read (No such file or directory); check the path"),
        ("mp4", lambda path: path.write_bytes(b"no film"), "cannot be decoded"),
        ("mp4", cut, "cannot be decoded"),
    ],
)
def test_media_that_cannot_be_read(
    world: World, refused: Refused, scenes: Path, files: str, damage: Damage, message: str
) -> None:
    for path in sorted((scenes / files).glob("train*/*")):
        damage(path)
    line = refused(*extract(world, scenes))
    assert "more than --max_failures 0.02 allows; the last: train_" in line and message in line
    assert not Path("hostile_code_ran").exists()
    with pytest.raises(XsdError, match="was interrupted"):
        HiddenStore.open(next(Path("hidden").iterdir()))


def test_a_failed_clip_is_counted_with_its_reason_and_mended(
    world: World, refused: Refused, scenes: Path, runs: Callable[..., list[Any]]
) -> None:
    video = next((scenes / "mp4/train_0001").glob("*"))
    whole = video.read_bytes()
    video.write_bytes(b"no film")
    assert "1 of 6 answers failed" in refused(*extract(world, scenes))
    xsd(*extract(world, scenes, "--max_failures", 0.2, "--output_dir", "counted"))
    [run] = runs("extract")
    assert run.data.metrics["train.num_failures"] == 1
    assert run.data.metrics["train.num_samples"] == 5
    [failure] = HiddenStore.open(next(Path("counted").iterdir())).failures
    assert failure.key.startswith("train_0001/") and "cannot be decoded" in failure.reason
    video.write_bytes(whole)
    xsd(*extract(world, scenes, "--output_dir", "mended"))
    assert not HiddenStore.open(next(Path("mended").iterdir())).failures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event_data": "../../../etc/passwd"}, "leaves the folder; remove it from the index"),
        ({"mp4_data": "/etc/passwd"}, "leaves the folder; remove it from the index"),
        ({"event_image": ["/etc/passwd"]}, "leaves the folder; remove it from the index"),
        ({"event_image": 3}, "event_image is not a path or a list of paths"),
        ({"event_data": "event_npy/\0/1.npy"}, "event_data is not a path"),
        ({"split": "dev"}, "split 'dev' is not train, val or test"),
        ({"mp4_data": None}, "neither mp4_data nor video_data"),
    ],
)
def test_an_index_of_scenes_is_not_trusted(
    world: World, refused: Refused, scenes: Path, change: dict[str, Any], message: str
) -> None:
    entries = json.loads((scenes / INDEX_NAME).read_text())
    entries[0].update(change)
    write_json(scenes / INDEX_NAME, entries)
    assert message in refused(*extract(world, scenes))
    assert message in refused("scenes", "--source", "prepared", "--dataset_dir", scenes)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no EventGPT"), ("{", "cannot be read as JSON"), ("{}", "not a list"), ("[]", "no sc")],
)
def test_an_index_of_scenes_that_is_none(
    world: World, refused: Refused, scenes: Path, text: str | None, message: str
) -> None:
    index = scenes / INDEX_NAME
    index.unlink() if text is None else index.write_text(text)
    assert message in refused(*extract(world, scenes))


def test_scenes_that_are_not_there(world: World, refused: Refused) -> None:
    assert "nope: no such file or folder" in refused(*extract(world, Path("nope")))
    assert "runs:/nope: no such run" in refused(*extract(world, Path("runs:/nope")))
    line = refused("scenes", "--source", "prepared", "--dataset_dir", "nope")
    assert "an existing folder; got nope" in line


def test_a_folder_without_an_index_has_no_test_split(
    world: World, refused: Refused, scenes: Path
) -> None:
    (scenes / INDEX_NAME).unlink()
    xsd("scenes", "--source", "prepared", "--dataset_dir", scenes)
    words = [*world.pair_flags, "--configs", "oracle", "--dataset_dir", scenes]
    line = refused("benchmark", *words)
    assert "no scenes in split 'test'; it has " in line and " train, " in line
    assert "choose another --split, or set 'split' of its entries" in line


def test_a_split_that_is_empty(world: World, refused: Refused, scenes: Path) -> None:
    entries = json.loads((scenes / INDEX_NAME).read_text())
    write_json(scenes / INDEX_NAME, [entry for entry in entries if entry["split"] != "test"])
    assert "no test scenes to extract" in refused(*extract(world, scenes, "--split", "test"))
    # Training answers alone can neither validate nor be scored.
    index = next(world.data.glob("chunked_train*")) / "index.json"
    shutil.copytree(index.parent, "no_val")
    content = json.loads(index.read_text().replace('"val"', '"train"'))
    write_json(Path("no_val/index.json"), signed(content))
    assert "its val split is empty; give --val_data" in refused(*train(world, Path("no_val")))


def test_training_answers_are_not_for_scoring(
    world: World, refused: Refused, trained: Path
) -> None:
    given = ["--checkpoint", trained, "--lm_head", world.head]
    line = refused("evaluate", *given, "--data", next(world.data.glob("chunked_train*")))
    assert "its test split is empty; give --data with test answers" in line

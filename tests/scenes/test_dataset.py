"""A synthetic data set on disk: complete, deterministic, resumable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xsd.errors import XsdError
from xsd.scenes.config import ScenesConfig
from xsd.scenes.dataset import make_scenes
from xsd.scenes.dsec import load_index
from xsd.scenes.events import event_images, load_events
from xsd.scenes.facts import Facts
from xsd.scenes.layout import INDEX_NAME
from xsd.scenes.questions import QUESTIONS
from xsd.scenes.video import read_frames


def small(folder: Path, **changes: object) -> ScenesConfig:
    base = ScenesConfig(
        output_dir=folder,
        num_train=5,
        num_val=2,
        num_test=2,
        clips_per_recording=2,
        size=48,
        num_workers=1,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    list(make_scenes(small(folder)))
    return folder


def test_layout_is_the_data_sets(made: Path) -> None:
    entry = json.loads((made / INDEX_NAME).read_text())[0]
    assert entry["event_data"] == "event_npy/train_0000/000000.npy"
    assert entry["mp4_data"] == "mp4/train_0000/000000.mp4"
    assert entry["event_image"][4] == "event_image/train_0000/000000_4.png"
    assert entry["event_image_1f"] == ["event_image_1f/train_0000/000000_0.png"]
    assert {"id", "split", "video_data", "conversations"} <= set(entry)


def test_files_agree_with_each_other(made: Path) -> None:
    scene = load_index(made, split="test")[0]
    assert scene.events is not None
    assert scene.event_image_1f is not None
    events = load_events(scene.events)
    drawn = event_images(events, 5) + event_images(events, 1)
    for path, image in zip((*scene.event_images, scene.event_image_1f), drawn, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image)
    assert read_frames(scene.video).shape == (8, 48, 48, 3)
    assert scene.facts is not None
    assert json.loads(json.dumps(Facts.from_dict(scene.facts).as_dict())) == scene.facts


def test_splits_and_recordings(made: Path) -> None:
    scenes = load_index(made)
    assert [scene.split for scene in scenes] == ["train"] * 5 + ["val"] * 2 + ["test"] * 2
    of_split = {s: {x.recording for x in scenes if x.split == s} for s in ("train", "val", "test")}
    assert len(of_split["train"]) == 3
    assert len(set.union(*of_split.values())) == sum(map(len, of_split.values()))
    for recording in of_split["train"]:
        facts = [scene.facts for scene in scenes if scene.recording == recording and scene.facts]
        assert len({(one["time"], one["roadside"]) for one in facts}) == 1


def test_a_second_run_keeps_everything(made: Path) -> None:
    before = contents(made)
    records = list(make_scenes(small(made)))
    assert all(record.is_reused for record in records)
    assert contents(made) == before


@pytest.mark.slow
def test_files_do_not_depend_on_the_number_of_workers(made: Path, tmp_path: Path) -> None:
    list(make_scenes(small(tmp_path, num_workers=2)))
    assert contents(tmp_path) == contents(made)


def test_an_interrupted_run_is_resumed(made: Path, tmp_path: Path) -> None:
    running = make_scenes(small(tmp_path))
    for _ in range(3):
        next(running)
    running.close()
    assert not (tmp_path / INDEX_NAME).exists()
    reused = [record.is_reused for record in make_scenes(small(tmp_path))]
    assert reused[:2] == [True, True]
    assert not any(reused[4:])
    assert contents(tmp_path) == contents(made)


def test_damage_is_found_and_mended(tmp_path: Path) -> None:
    config = small(tmp_path, num_train=2, num_val=2, num_test=0)
    list(make_scenes(config))
    before = contents(tmp_path)
    (tmp_path / "mp4/train_0000/000001.mp4").write_bytes(b"damaged")
    (tmp_path / "event_npy/val_0000/000000.npy").unlink()
    assert not any(record.is_reused for record in make_scenes(config))
    assert contents(tmp_path) == before


def test_another_seed_makes_other_scenes(tmp_path: Path) -> None:
    config = small(tmp_path, num_train=2, num_val=0, num_test=0)
    before = [record.facts for record in make_scenes(config)]
    records = list(make_scenes(replace(config, seed=1)))
    assert not any(record.is_reused for record in records)
    assert [record.facts for record in records] != before


def test_answers_fill_the_conversations(tmp_path: Path) -> None:
    def answer(facts: Facts, question_index: int) -> str:
        return f"{facts.time} {question_index}"

    config = small(tmp_path, num_train=1, num_val=0, num_test=0)
    (record,) = make_scenes(config, answer)
    assert record.facts is not None
    (entry,) = json.loads((tmp_path / INDEX_NAME).read_text())
    assert len(entry["conversations"]) == 2 * len(QUESTIONS)
    assert entry["conversations"][0] == {"from": "human", "value": QUESTIONS[0]}
    assert entry["conversations"][3] == {"from": "gpt", "value": f"{record.facts.time} 1"}


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "dsec"},
        {"source": "video"},
        {"size": 33},
        {"seed": -1},
        {"clips_per_recording": 0},
        {"num_train": -1},
        {"num_train": 0, "num_val": 0, "num_test": 0},
    ],
)
def test_impossible_configurations(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(XsdError):
        list(make_scenes(small(tmp_path / "out", **changes)))
    assert not (tmp_path / "out").exists()


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(XsdError, match=r"cannot be made .*choose another place"):
        list(make_scenes(small(tmp_path / "file")))

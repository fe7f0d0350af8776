"""The index: tolerant of what the data set leaves out, strict about what is untrusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xsd.errors import XsdError
from xsd.scenes.config import ScenesConfig
from xsd.scenes.dataset import make_scenes
from xsd.scenes.dsec import dataset_digest, load_index, samples
from xsd.scenes.layout import INDEX_NAME, index_entry
from xsd.scenes.questions import QUESTIONS


def write_index(folder: Path, entries: Any) -> Path:
    (folder / INDEX_NAME).write_text(json.dumps(entries))
    return folder


def entries(num_recordings: int, num_clips: int = 2, split: str = "train") -> list[dict[str, Any]]:
    return [
        index_entry(f"{split}_{recording:02d}", clip, split)
        for recording in range(num_recordings)
        for clip in range(num_clips)
    ]


@pytest.mark.parametrize(("num_recordings", "held_out"), [(2, 1), (9, 1), (20, 2), (26, 3)])
def test_validation_recordings_are_held_out(
    tmp_path: Path, num_recordings: int, held_out: int
) -> None:
    write_index(tmp_path, entries(num_recordings) + entries(3, split="test"))
    scenes = load_index(tmp_path)
    by_split = {s: {x.recording for x in scenes if x.split == s} for s in ("train", "val", "test")}
    assert len(by_split["val"]) == held_out
    assert len(by_split["train"]) == num_recordings - held_out
    assert not by_split["val"] & by_split["train"]
    write_index(tmp_path, (entries(num_recordings) + entries(3, split="test"))[::-1])
    assert {x.recording for x in load_index(tmp_path, split="val")} == by_split["val"]


def test_a_lone_recording_stays_in_training(tmp_path: Path) -> None:
    write_index(tmp_path, entries(1))
    assert {scene.split for scene in load_index(tmp_path)} == {"train"}
    with pytest.raises(XsdError, match="no scenes in split 'val'"):
        load_index(tmp_path, split="val")


def test_a_given_validation_split_is_kept(tmp_path: Path) -> None:
    write_index(tmp_path, entries(5) + entries(1, split="val"))
    assert len(load_index(tmp_path, split="val")) == 2


def test_limits(tmp_path: Path) -> None:
    write_index(tmp_path, entries(5))
    scenes = load_index(tmp_path, max_samples=3, split="train")
    assert len(scenes) == 3
    asked = list(samples(scenes, max_questions=4))
    assert len(asked) == 12
    assert asked[5].key == f"{scenes[1].key}/q1"
    assert asked[5].question == QUESTIONS[1]
    assert len(list(samples(scenes))) == 30


def test_sparse_entries(tmp_path: Path) -> None:
    (tmp_path / "video" / "night_a" / "000003").mkdir(parents=True)
    entry = {
        "id": 7,
        "split": "test",
        "event_data": "event_npy/night_a/000003.npy",
        "video_data": "video/night_a/000003",
        "event_image": [],
    }
    (scene,) = load_index(write_index(tmp_path, [entry]))
    assert scene.key == "night_a/000003"
    assert scene.event_images == ()
    assert scene.event_image_1f is None
    assert scene.video.is_dir()
    assert scene.facts is None


@pytest.mark.parametrize("key", ["event_data", "mp4_data", "event_image"])
@pytest.mark.parametrize("path", ["../secret/000000.npy", "/etc/000000.npy", "a/../../b/0.npy"])
def test_paths_must_stay_inside(tmp_path: Path, key: str, path: str) -> None:
    entry = {**entries(1)[0], key: [path] if key == "event_image" else path}
    with pytest.raises(XsdError, match="leaves the folder"):
        load_index(write_index(tmp_path, [entry]))


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "event_npy").symlink_to(tmp_path / "outside")
    with pytest.raises(XsdError, match="leaves the folder"):
        load_index(write_index(folder, entries(1)))


@pytest.mark.parametrize(
    "change",
    [
        {"split": "training"},
        {"event_data": 3},
        {"event_image": [None]},
        {"event_data": "event_npy/a/\0.npy"},
        {"mp4_data": None},
        {"event_data": "event_npy/a/first.npy"},
    ],
)
def test_malformed_entries(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(XsdError) as caught:
        load_index(write_index(tmp_path, [{**entries(1)[0], **change}]))
    assert "\n" not in str(caught.value)


def test_unusable_index(tmp_path: Path) -> None:
    with pytest.raises(XsdError, match="xsd scenes"):
        load_index(tmp_path)
    for content in ({}, [1], []):
        with pytest.raises(XsdError):
            load_index(write_index(tmp_path, content))
    (tmp_path / INDEX_NAME).write_text("[{")
    with pytest.raises(XsdError, match="JSON"):
        load_index(tmp_path)


def test_digest_follows_index_and_files(tmp_path: Path) -> None:
    write_index(tmp_path, entries(1, num_clips=1))
    digests = [dataset_digest(tmp_path)]
    events = tmp_path / "event_npy" / "train_00" / "000000.npy"
    events.parent.mkdir(parents=True)
    for content in (b"", b"a" * 200_000, b"a" * 199_999 + b"b", b"b" + b"a" * 199_999):
        events.write_bytes(content)
        digests.append(dataset_digest(tmp_path))
    assert dataset_digest(tmp_path) == digests[-1]
    write_index(tmp_path, entries(1, num_clips=2))
    digests.append(dataset_digest(tmp_path))
    assert len(set(digests)) == len(digests)


def test_prepared_folder_is_indexed(tmp_path: Path) -> None:
    made = ScenesConfig(
        output_dir=tmp_path, num_train=2, num_val=0, num_test=0, size=32, num_workers=1
    )
    given = list(make_scenes(made))
    (tmp_path / INDEX_NAME).unlink()
    prepared = ScenesConfig(source="prepared", dataset_dir=tmp_path)
    found = list(make_scenes(prepared))
    assert [record.entry for record in found] == [record.entry for record in given]
    assert [record.facts for record in found] == [record.facts for record in given]
    assert [record.key for record in make_scenes(prepared)] == [record.key for record in given]


def test_prepared_folder_that_is_none(tmp_path: Path) -> None:
    for folder in (None, tmp_path / "absent", tmp_path):
        with pytest.raises(XsdError):
            list(make_scenes(ScenesConfig(source="prepared", dataset_dir=folder)))
    events = tmp_path / "event_npy" / "a" / "000000.npy"
    events.parent.mkdir(parents=True)
    events.touch()
    with pytest.raises(XsdError, match=r"has no mp4/a/000000\.mp4"):
        list(make_scenes(ScenesConfig(source="prepared", dataset_dir=tmp_path)))
    assert not (tmp_path / INDEX_NAME).exists()

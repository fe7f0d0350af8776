"""Raw recordings, packed with blosc as DSEC's are, cut into clips."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
from PIL import Image

from xsd.errors import XsdError
from xsd.scenes.config import ScenesConfig
from xsd.scenes.dataset import make_scenes, num_clips
from xsd.scenes.dsec import load_index
from xsd.scenes.events import load_events
from xsd.scenes.produce import produce
from xsd.scenes.raw_dsec import EventFile, find_recordings, image_times, plan_dsec
from xsd.scenes.video import read_frames

OFFSET = 55_000_000_000
SECONDS, RATE = 3.2, 4000


def write_raw(
    root: Path, name: str = "zurich_city_00_a", *, events_under: str = "", images_under: str = ""
) -> dict[str, np.ndarray]:
    """A recording of 3.2 s; nothing happens between 1.0 and 2.1 s. Frames begin 30 ms late."""
    random = np.random.default_rng(0)
    t = np.sort(random.integers(0, int(SECONDS * 1e6), int(SECONDS * RATE)))
    t = t[(t < 1_000_000) | (t > 2_100_000)]
    n = len(t)
    columns = {
        "x": random.integers(0, 64, n).astype(np.uint16),
        "y": random.integers(0, 48, n).astype(np.uint16),
        "t": t.astype(np.uint32),
        "p": random.integers(0, 2, n).astype(np.uint8),
    }
    events = root / events_under / name / "events/left"
    events.mkdir(parents=True)
    with h5py.File(events / "events.h5", "w") as file:
        for key, column in columns.items():
            file.create_dataset(f"events/{key}", data=column, chunks=(997,), **hdf5plugin.Blosc())
        table = np.searchsorted(t, np.arange(int(SECONDS * 1000)) * 1000).astype(np.uint64)
        file.create_dataset("ms_to_idx", data=table, **hdf5plugin.Blosc())
        file["t_offset"] = OFFSET
    images = root / images_under / name / "images/left/rectified"
    images.mkdir(parents=True)
    times = OFFSET + 30_000 + np.arange(64) * 50_000
    for k in range(len(times)):
        Image.fromarray(np.full((49, 65, 3), 3 * k, np.uint8)).save(images / f"{k:06d}.png")
    np.savetxt(images.parents[1] / "timestamps.txt", times, fmt="%d")
    return columns


def config(root: Path, out: Path, **changes: object) -> ScenesConfig:
    base = ScenesConfig(source="dsec", dataset_dir=root, output_dir=out, num_workers=1)
    return replace(base, **changes)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_events_between_two_instants_are_exactly_those(tmp_path: Path) -> None:
    columns = write_raw(tmp_path)
    (recording,) = find_recordings(tmp_path, "auto")
    t = columns["t"].astype(np.int64)
    with h5py.File(recording.events) as file:
        # Registered number of blosc: a plugin, none of h5py's own filters.
        assert file["events/x"].id.get_create_plist().get_filter(0)[0] == 32001
    with EventFile(recording.events) as events:
        for begin, end in ((0, 1), (12_345, 678_901), (999_999, 2_100_500), (3_000_000, 9_000_000)):
            found = events.between(OFFSET + begin, OFFSET + end)
            inside = (t >= begin) & (t < end)
            if not inside.any():
                assert found is None
                continue
            assert found is not None
            np.testing.assert_array_equal(found.t, t[inside] - begin)
            for key in "xyp":
                np.testing.assert_array_equal(getattr(found, key), columns[key][inside])
        assert events.between(OFFSET - 5_000, OFFSET) is None


def test_clips_in_the_data_sets_layout(tmp_path: Path) -> None:
    columns = write_raw(tmp_path / "raw")
    write_raw(tmp_path / "raw", "thun_01_b")
    made = config(tmp_path / "raw", tmp_path / "out")
    assert num_clips(made) == 2 * 5
    records = list(make_scenes(made))
    scenes = load_index(tmp_path / "out")
    assert [record.key for record in records] == [scene.key for scene in scenes]
    # From 30 ms on, every half second; the window from 1.03 s to 2.03 s has no events.
    assert [scene.clip for scene in scenes if scene.recording == "thun_01_b"] == [0, 1, 3, 4]
    assert {scene.recording: scene.split for scene in scenes} == {
        "thun_01_b": "test",
        "zurich_city_00_a": "train",
    }
    scene = next(s for s in scenes if s.key == "zurich_city_00_a/000003")
    assert scene.events is not None and scene.event_image_1f is not None
    events, t = load_events(scene.events), columns["t"].astype(np.int64)
    inside = (t >= 1_530_000) & (t < 2_530_000)
    np.testing.assert_array_equal(events.t, t[inside] - 1_530_000)
    np.testing.assert_array_equal(events.x, columns["x"][inside])
    assert len(scene.event_images) == 5 and scene.event_image_1f.is_file()
    frames = read_frames(scene.video)
    assert frames.shape == (8, 48, 64, 3)
    # The window's twenty frames are 30 to 49; the sampler takes 0, 2, 5, ..., 19 of them.
    assert abs(int(frames[0].mean()) - 3 * 30) <= 3 and abs(int(frames[-1].mean()) - 3 * 49) <= 3


def test_window_and_stride(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    made = config(tmp_path / "raw", tmp_path / "out", window_s=0.5, stride_s=0.25)
    records = list(make_scenes(made))
    clips = [int(record.key[-6:]) for record in records]
    assert clips == [k for k in range(11) if not 3 < k < 7]
    events = [record.num_events for record in records]
    assert events[0] == pytest.approx(0.5 * RATE, rel=0.1)


def test_the_archives_top_folders(tmp_path: Path) -> None:
    write_raw(tmp_path, "some_drive", events_under="test_events", images_under="test_images")
    (recording,) = find_recordings(tmp_path, "auto")
    assert recording.split == "test"
    times, images = image_times(recording)
    assert len(times) == len(images) == 64
    (forced,) = find_recordings(tmp_path, "train")
    assert forced.split == "train"


def test_exposures_have_a_beginning_and_an_end(tmp_path: Path) -> None:
    write_raw(tmp_path)
    (recording,) = find_recordings(tmp_path, "auto")
    times, _ = image_times(recording)
    table = np.stack([times - 500, times + 500], axis=1)
    np.savetxt(recording.times, table, fmt="%d", delimiter=",", header="start,end")
    np.testing.assert_array_equal(image_times(recording)[0], times)


@pytest.mark.slow
def test_parallel_cutting_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a_00_a", "b_00_a"):
        write_raw(tmp_path / "raw", name)
    for workers in (1, 2):
        list(make_scenes(config(tmp_path / "raw", tmp_path / str(workers), num_workers=workers)))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_an_interrupted_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsd.scenes.produce.CLIPS_A_JOB", 2)
    write_raw(tmp_path / "raw")
    made = config(tmp_path / "raw", tmp_path / "out")
    running = make_scenes(made)
    next(running)
    running.close()
    assert not list((tmp_path / "out").glob("*.json"))
    reused = [record.is_reused for record in make_scenes(made)]
    assert reused[:2] == [True, True] and not any(reused[2:])
    # Another window: nothing of the old clips is taken for the new ones.
    jobs = plan_dsec(replace(made, window_s=0.75))
    assert not any(record.is_reused for record in produce(jobs, 1))


def test_two_recordings_of_one_name_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw/2020")
    write_raw(tmp_path / "raw/2021")
    with pytest.raises(XsdError, match="two recordings would be 'zurich_city_00_a'; rename or"):
        plan_dsec(config(tmp_path / "raw", tmp_path / "out"))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for root in (None, tmp_path / "absent"):
        with pytest.raises(XsdError, match="needs dataset_dir"):
            plan_dsec(replace(config(tmp_path, tmp_path / "out"), dataset_dir=root))
    with pytest.raises(XsdError, match="unpack DSEC's events there"):
        plan_dsec(config(tmp_path, tmp_path / "out"))
    write_raw(tmp_path / "raw")
    root = tmp_path / "raw/zurich_city_00_a"
    made = config(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(XsdError, match="must be above 0"):
        plan_dsec(replace(made, stride_s=0.0))
    (root / "images/timestamps.txt").write_text("1\n2\n")
    with pytest.raises(XsdError, match="2 times for 64 images"):
        plan_dsec(made)
    (root / "images/timestamps.txt").write_text("soon\n")
    with pytest.raises(XsdError, match="not a table of times"):
        plan_dsec(made)
    (root / "images/timestamps.txt").unlink()
    with pytest.raises(XsdError, match=r"no timestamps\.txt"):
        plan_dsec(made)
    (root / "images/left").rename(root / "images/centre")
    with pytest.raises(XsdError, match="unpack the recording's images too"):
        plan_dsec(made)


@pytest.mark.parametrize("damage", ["noise", "cut", "no offset", "empty"])
def test_a_damaged_event_file_is_one_line(tmp_path: Path, damage: str) -> None:
    write_raw(tmp_path)
    path = tmp_path / "zurich_city_00_a/events/left/events.h5"
    if damage == "noise":
        path.write_bytes(b"not hdf5" * 100)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        with h5py.File(path, "r+") as file:
            if damage == "no offset":
                del file["t_offset"]
            else:
                del file["events/t"]
                file["events/t"] = np.zeros(0, np.uint32)
    with pytest.raises(XsdError, match=r"not DSEC's events\.h5") as caught:
        plan_dsec(config(tmp_path, tmp_path / "out"))
    assert "\n" not in str(caught.value)

"""``xsd store`` on folders, runs and object storage."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.conftest import World
from tests.hidden.test_store import seed_folder
from xsd.cli import main
from xsd.hidden.index import signed
from xsd.hidden.store import HiddenStore
from xsd.tracking.run import stage_run

TRAIN, TEST = "chunked_train_1s_fp32", "chunked_test_1s_fp32"


@pytest.fixture
def memory() -> Iterator[str]:
    """An object store, empty."""
    import fsspec

    yield "memory://bucket"
    fsspec.filesystem("memory").store.clear()


def store(*words: object, expect: int = 0) -> None:
    assert main(["store", *map(str, words)]) == expect


def test_stats_and_verify_of_all_stores_below(
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store("stats", world.data)
    told = capsys.readouterr().out
    assert f"{TRAIN}: complete" in told and f"{TEST}: complete" in told
    assert "answers     12 train, 6 val; 6 clips, 0 failures" in told
    assert "miniature" not in told and "teacher_forced, widths 24 and 32" in told
    store("verify", world.data / TRAIN, world.data / TEST)
    told = capsys.readouterr().out
    assert told.count("3 files, all whole") == 2


def test_there_and_back_through_object_storage(
    world: World,
    memory: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store("convert", world.data / TRAIN, "--target", f"{memory}/a")
    store("verify", f"{memory}/a")
    store("stats", memory)
    assert "12 train, 6 val" in capsys.readouterr().out
    store("convert", f"{memory}/a", "--target", f"file://{tmp_path}/back")
    one, other = HiddenStore.open(world.data / TRAIN), HiddenStore.open(tmp_path / "back")
    assert one.digest == other.digest and one.keys("val") == other.keys("val")
    store("convert", world.data / TRAIN, "--target", f"{memory}/a", expect=2)
    assert "holds hidden states already" in capsys.readouterr().err


def test_a_runs_artifacts(
    world: World,
    tracking: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stage_run("extract", "tiny", {}) as run:
        run.artifacts(world.data / TEST, TEST)
    store("verify", f"runs:/{run.run_id}")
    assert "3 files, all whole" in capsys.readouterr().out
    store("stats", f"runs:/{run.run_id}/{TEST}")
    store("verify", "runs:/nope", expect=2)
    assert "runs:/nope: no such run" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_damage_is_named(
    world: World,
    memory: str,
    where: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import fsspec

    target = f"{memory}/a" if where == "memory" else str(tmp_path / "a")
    store("convert", world.data / TRAIN, "--target", target)
    fs, root = fsspec.core.url_to_fs(target)
    [chunk] = fs.glob(f"{root}/chunks/*")
    content = bytearray(fs.cat_file(chunk))
    content[-1] ^= 1
    fs.pipe_file(chunk, bytes(content))
    [visual] = fs.glob(f"{root}/visual/*")
    fs.rm(visual)
    store("verify", target, expect=2)
    told = capsys.readouterr()
    assert "chunk_000000.safetensors: its sha256 is not the index's" in told.out
    assert "visual_000000.safetensors: it is missing" in told.out
    assert "2 files are not what the index says" in told.err
    store("convert", target, "--target", tmp_path / "b", expect=2)
    assert not (tmp_path / "b/index.json").exists()


def renamed(source: Path, folder: Path, recording: str) -> Path:
    """A part of the test store, as an extraction of some recording would be."""
    shutil.copytree(source, folder)
    index = json.loads((folder / "index.json").read_text())
    for sample in index["chunks"][0]["samples"]:
        sample["key"] = sample["key"].replace("test_0000", recording)
    index["visual"][0]["scenes"] = [
        scene.replace("test_0000", recording) for scene in index["visual"][0]["scenes"]
    ]
    (folder / "index.json").write_text(json.dumps(signed(index)))
    return folder


def test_merging_takes_one_kind_and_every_answer_once(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other = (renamed(world.data / TEST, tmp_path / name, name) for name in ("first", "second"))
    store("merge", one, other, "--target", tmp_path / "both")
    store("verify", tmp_path / "both")
    both = HiddenStore.open(tmp_path / "both")
    assert both.keys() == HiddenStore.open(one).keys() + HiddenStore.open(other).keys()
    assert [path.name for path in sorted((tmp_path / "both/chunks").iterdir())] == [
        "chunk_000000.safetensors",
        "chunk_000006.safetensors",
    ]
    assert both.visual("second/000001").projected.shape[1] == 32
    capsys.readouterr()
    store("merge", one, one, "--target", tmp_path / "x", expect=2)
    assert "answer first/000000/q0 is in" in capsys.readouterr().err
    store("merge", one, world.data / TRAIN, "--target", tmp_path / "x", expect=2)
    assert "its config" in capsys.readouterr().err
    store("merge", world.data, "--target", tmp_path / "x", expect=2)
    assert f"holds {TEST}, {TRAIN}; name one of them" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_published_chunks_become_mapped_ones(tmp_path: Path) -> None:
    source = seed_folder(tmp_path / "seed")
    store("verify", source)
    store("convert", source, "--target", tmp_path / "ours", "--dtype", "bf16")
    store("verify", tmp_path / "ours")
    seed, ours = HiddenStore.open(source), HiddenStore.open(tmp_path / "ours")
    assert ours.keys("val") == seed.keys("val") and ours.keys() == seed.keys()
    assert ours.approximate_split and not ours.has_ids and not ours.has_visual
    assert ours.header.dtype == "bf16" and ours.num_bytes < seed.num_bytes
    for one, other in zip(seed, ours, strict=True):
        assert (one.verifier_hidden.bfloat16() == other.verifier_hidden).all()


def test_ours_become_published_ones(world: World, tmp_path: Path) -> None:
    store("convert", world.data / TEST, "--target", tmp_path / "pt", "--chunk_format", "pt")
    store("verify", tmp_path / "pt")
    found = HiddenStore.open(tmp_path / "pt")
    assert not found.has_ids and not found.has_visual and len(found) == 6
    sample = HiddenStore.open(world.data / TEST).sample(found.keys()[1])
    assert (found.sample(sample.key).drafter_hidden == sample.drafter_hidden.float()).all()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["check", "x"], "--action: 'check' is not one of verify, stats, convert, merge"),
        (["verify"], "xsd store verify SOURCE ...: name a store"),
        (["verify", "nowhere"], "no index.json there or right below"),
        (["verify", "nopro://x"], "Protocol not known: nopro"),
        (["verify", "gs://bucket/x"], "gs://bucket/x: Please install gcsfs"),
        (["convert", "x", "--target", "abfs://box/x"], "abfs://box/x: Install adlfs"),
        (["stats", "s3://me:hidden@bucket/x"], "s3://***@bucket/x: holds a password"),
        (["convert", "x"], "say where to with --target"),
        (["verify", "x", "--target", "y"], "xsd store verify writes nothing"),
        (["convert", "x", "y", "--target", "z"], "one source at a time"),
        (["merge", "x", "--target", "z", "--dtype", "bf16"], "of xsd store convert, not merge"),
        (["stats", "x", "--dtype", "int3"], "dtype: 'int3' is not"),
    ],
)
def test_bad_words(
    words: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    store(*words, expect=2)
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd"])
def test_an_index_that_leaves_its_folder(
    world: World,
    memory: str,
    path: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import fsspec

    store("convert", world.data / TEST, "--target", f"{memory}/a")
    fs = fsspec.filesystem("memory")
    index = json.loads(fs.cat_file("/bucket/a/index.json"))
    index["chunks"][0]["path"] = path
    fs.pipe_file("/bucket/a/index.json", json.dumps(signed(index)).encode())
    store("verify", f"{memory}/a", expect=2)
    told = capsys.readouterr()
    assert "leaves the folder" in told.err or "it is missing" in told.out


@pytest.mark.parametrize("path", ["../{victim}", "/{folder}/{victim}"])
def test_visual_states_are_written_where_the_target_is(
    world: World, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that lies in the source under the name of one elsewhere is converted, not written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    victim = tmp_path / "victim.safetensors"
    victim.write_text("here first")
    source = tmp_path / "source"
    shutil.copytree(world.data / TEST, source)
    index = json.loads((source / "index.json").read_text())
    name = path.format(victim=victim.name, folder=tmp_path.relative_to("/"))
    [visual] = (source / "visual").iterdir()
    hostile = source / "visual" / name.lstrip("/")
    hostile.parent.mkdir(parents=True, exist_ok=True)
    visual.rename(hostile)
    index["visual"][0]["path"] = name
    (source / "index.json").write_text(json.dumps(signed(index)))
    store("convert", source, "--target", tmp_path / "target", "--dtype", "fp32")
    assert victim.read_text() == "here first"
    assert [x.name for x in (tmp_path / "target/visual").iterdir()] == [victim.name]
    store("verify", tmp_path / "target")

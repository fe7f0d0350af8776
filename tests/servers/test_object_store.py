"""``xsd store`` on an S3-compatible server, and stages that read what lies there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.conftest import World
from tests.servers.conftest import SECRET
from xsd.cli import main
from xsd.files import sha256_file
from xsd.hidden.store import HiddenStore
from xsd.tracking import figures, products

TRAIN, TEST = "chunked_train_1s_fp32", "chunked_test_1s_fp32"


@pytest.fixture
def remote(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty folder of the bucket; s3fs is told where and who by the environment, as boto3 is."""
    import s3fs

    told = {
        "AWS_ENDPOINT_URL": bucket,
        "AWS_ACCESS_KEY_ID": "xsd",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"s3://xsd/{tmp_path.name}"
    s3fs.S3FileSystem.clear_instance_cache()


def store(*words: object, expect: int = 0) -> None:
    assert main(["store", *map(str, words)]) == expect


def test_there_and_back(
    world: World, remote: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store("convert", world.data, "--target", f"{remote}/a")
    store("verify", f"{remote}/a")
    assert capsys.readouterr().out.count("3 files, all whole") == 2
    store("stats", f"{remote}/a/{TRAIN}")
    told = capsys.readouterr().out
    assert "complete" in told and "12 train, 6 val; 6 clips" in told
    store("convert", f"{remote}/a/{TRAIN}", "--target", tmp_path / "back")
    one, other = HiddenStore.open(world.data / TRAIN), HiddenStore.open(tmp_path / "back")
    assert one.digest == other.digest
    store("convert", f"{remote}/a/{TRAIN}", "--target", f"{remote}/bf16", "--dtype", "bf16")
    store("verify", f"{remote}/bf16")
    store("convert", world.data / TRAIN, "--target", f"{remote}/bf16", expect=2)
    assert "holds hidden states already" in capsys.readouterr().err


def test_merged_there(world: World, remote: str, tmp_path: Path) -> None:
    from tests.commands.test_store_verb import renamed

    parts = [renamed(world.data / TEST, tmp_path / name, name) for name in ("first", "second")]
    store("convert", parts[0], "--target", f"{remote}/first")
    store("merge", f"{remote}/first", parts[1], "--target", f"{remote}/both")
    store("verify", f"{remote}/both")
    store("convert", f"{remote}/both", "--target", tmp_path / "back")
    keys = [key for part in parts for key in HiddenStore.open(part).keys(None)]
    assert list(HiddenStore.open(tmp_path / "back").keys()) == keys


def test_damage_is_named(world: World, remote: str, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    store("convert", world.data / TRAIN, "--target", remote)
    fs, root = fsspec.core.url_to_fs(remote)
    [chunk], [visual] = fs.glob(f"{root}/chunks/*"), fs.glob(f"{root}/visual/*")
    content = bytearray(fs.cat_file(chunk))
    content[-1] ^= 1
    fs.pipe_file(chunk, bytes(content))
    fs.rm(visual)
    store("verify", remote, expect=2)
    told = capsys.readouterr()
    assert "its sha256 is not the index's" in told.out and "it is missing" in told.out
    assert "2 files are not what the index says" in told.err


@pytest.mark.parametrize(
    ("uri", "line"),
    [("s3://xsd/nothing/here", "no index.json there or right below"), ("s3://no-bucket/x", "")],
)
def test_what_is_not_there(
    remote: str, uri: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store("verify", uri, expect=2)
    error = capsys.readouterr().err
    assert line in error and uri in error and error.count("\n") == 1


def test_no_secret_is_told(
    remote: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither when nobody answers, nor when they are given in the URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store("verify", "s3://xsd/x", expect=2)
    store("verify", f"s3://xsd:{SECRET}@xsd/x", expect=2)
    told = "".join(capfd.readouterr())
    assert SECRET not in told and told.count("\n") == 2


def test_training_and_evaluation_read_it(
    world: World,
    remote: str,
    tracking: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fetched once, checked, and as good as a folder of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "_browser_found", lambda: False)
    store("convert", world.data, "--target", remote)
    local = [str(word) for word in world.train_flags]
    there = [remote if word == str(world.data) else word for word in local]
    for words, folder in ((local, "local"), (there, "there")):
        given = ["--level", "L1", "--num_epochs", "1", "--output_dir", folder]
        assert main(["train", *words, *given]) == 0
    trained = [next(Path(name).rglob("best_model.safetensors")) for name in ("local", "there")]
    assert sha256_file(trained[0]) == sha256_file(trained[1])
    given = ["--checkpoint", str(trained[1].parent), "--lm_head", str(world.head)]
    fetched = sorted(products.downloads().glob("store_*/*/*/*"))
    before = [path.stat().st_mtime_ns for path in fetched]
    assert main(["evaluate", *world.pair_flags, *given, "--data", remote]) == 0
    assert len(fetched) == 4 and before == [path.stat().st_mtime_ns for path in fetched]

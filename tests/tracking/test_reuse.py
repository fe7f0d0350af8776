from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import xsd
from xsd.errors import XsdError
from xsd.tracking import products, reuse
from xsd.tracking.run import stage_run

pytestmark = pytest.mark.usefixtures("tracking")
CONFIG = {"lr": 0.1, "data": "/somewhere", "output_dir": "here"}
ROOMS = ["tracking", "config"]


def product(digest: str = "d") -> products.Product:
    return products.Product(uri="x", path=Path(), digest=digest)


def key(**changes: object) -> str:
    return reuse.stage_key("train", CONFIG | changes, {"data": product()}, ROOMS)


def test_the_key_knows_what_matters() -> None:
    assert key() == key(output_dir="there", data="elsewhere")
    assert key() != key(lr=0.2)
    assert key() != reuse.stage_key("train", CONFIG, {"data": product("other")}, ROOMS)
    assert key() != reuse.stage_key("train", CONFIG, {"data": product()}, ROOMS[:1])
    assert key() != reuse.stage_key("evaluate", CONFIG, {"data": product()}, ROOMS)


@pytest.mark.parametrize("package", ["torch", "transformers", "numba", "numpy"])
def test_another_version_of_a_package_makes_another_key(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, installed = key(), reuse.version
    changed = {package: "0.0.1"}
    monkeypatch.setattr(reuse, "version", lambda name: changed.get(name) or installed(name))
    assert key() != before


def test_altered_source_makes_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    package = tmp_path / "xsd"
    shutil.copytree(Path(xsd.__file__).parent / "tracking", package / "tracking")
    shutil.copy(Path(xsd.__file__).with_name("config.py"), package)
    monkeypatch.setattr(xsd, "__file__", str(package / "__init__.py"))
    assert key() == before
    with (package / "tracking" / "run.py").open("a") as source:
        source.write("# altered\n")
    assert key() != before


def test_the_key_needs_rooms_that_exist() -> None:
    with pytest.raises(ValueError, match="no room 'kitchen'"):
        reuse.stage_key("train", {}, {}, ["kitchen"])


def finish(tmp_path: Path, stage_key: str | None = None, **tags: str) -> str:
    tmp_path.joinpath("a.bin").write_bytes(b"abc")
    with stage_run("train", "tiny", {"lr": 0.1}, key=stage_key, tags=tags) as run:
        run.artifact(tmp_path / "a.bin")
    return run.run_id


def test_a_finished_run_is_found_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reuse.find_finished(key()) is None
    run_id = finish(tmp_path, key())
    found = reuse.find_finished(key())
    assert found is not None
    assert found.run_id == run_id
    assert (found.path / "a.bin").read_bytes() == b"abc"
    assert capsys.readouterr().out == f"train: reused run {run_id}\n"
    assert reuse.find_finished(key(lr=0.2)) is None


@pytest.mark.parametrize("damage", ["altered", "shorter", "missing", "gone", "model"])
def test_a_damaged_run_is_not_reused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    with stage_run("train", "tiny", {}, key="k") as run:
        run.artifact(path)
        model = run.log_model("adapter", [path])
    assert run.folder is not None
    kept = run.folder / "a.bin"
    if damage == "model":
        kept = products.load(f"models:/{model}").path / "a.bin"
    kept.unlink()
    if damage == "gone":
        run.folder.joinpath("manifest.json").unlink()
        run.folder.rmdir()
    elif damage != "missing":
        kept.write_bytes(b"abd" if damage != "shorter" else b"a")
    assert reuse.find_finished("k") is None
    if damage in ("altered", "shorter", "missing"):
        with pytest.raises(XsdError, match=r"a\.bin"):
            products.load(run.uri)


def test_the_newest_by_stage_pair_and_filters(tmp_path: Path) -> None:
    first = finish(tmp_path, level="L1")
    second = finish(tmp_path, level="L4")
    newest = reuse.newest_finished("train", "tiny")
    assert newest is not None
    assert newest.run_id == second
    older = reuse.newest_finished("train", "tiny", {"level": "L1", "cfg.lr": 0.1})
    assert older is not None
    assert older.run_id == first
    assert reuse.newest_finished("train", "real") is None
    assert reuse.newest_finished("train", "tiny", {"cfg.lr": 9}) is None


def test_plain_paths_have_a_digest(tmp_path: Path) -> None:
    tmp_path.joinpath("b").mkdir()
    tmp_path.joinpath("b/x").write_text("1")
    before = products.load(tmp_path / "b").digest
    tmp_path.joinpath("b/.x").write_text("hidden")
    assert products.load(tmp_path / "b").digest == before
    tmp_path.joinpath("b/x").write_text("2")
    assert products.load(tmp_path / "b").digest != before


@pytest.mark.parametrize("uri", ["nowhere", "runs:/nope", "models:/nope@champion", "models:/m-1"])
def test_what_is_not_there_is_one_line(uri: str) -> None:
    with pytest.raises(XsdError) as caught:
        products.load(uri)
    assert str(caught.value).startswith(uri)
    assert "\n" not in str(caught.value)

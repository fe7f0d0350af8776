from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xsd.cli import main
from xsd.errors import XsdError
from xsd.tracking import clean, products, registry, spool, store
from xsd.tracking.run import stage_run


@pytest.fixture(autouse=True)
def kernels(tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches and work folders of this test alone; returns the folder of the present kernels."""
    folder = tmp_path / "cache" / "xsd" / "kernels" / ("a" * 16)
    folder.mkdir(parents=True)
    monkeypatch.setattr(clean, "_kernels", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def collect(*words: str) -> None:
    assert main(["gc", "--older_than_days", "0", "--apply", *words]) == 0


def ended(status: str, file: Path, **options: object) -> str:
    """A run with one artifact, ended as told."""
    with stage_run("train", "tiny", {}, **options) as run:
        run.artifact(file)
    store.client().set_terminated(run.run_id, status)
    return run.run_id


def folder_of(run_id: str) -> Path:
    return store.local_root() / "tiny" / run_id


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    return path


def is_deleted(run_id: str) -> bool:
    return store.client().get_run(run_id).info.lifecycle_stage == "deleted"


def test_nothing_goes_without_apply(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = ended("FAILED", file)
    assert main(["gc"]) == 0
    assert "0 stale runs, 0 items" in capsys.readouterr().out
    assert main(["gc", "--older_than_days", "0"]) == 0
    assert f"{run_id} train  FAILED" in capsys.readouterr().out
    assert folder_of(run_id).is_dir() and not is_deleted(run_id)
    collect()
    assert is_deleted(run_id) and not folder_of(run_id).exists()
    assert file.read_bytes() == b"abc"


def test_what_a_champion_or_benchmark_was_made_of_stays(file: Path) -> None:
    """Through two generations, though the sources were marked as failed or deleted."""
    data = ended("KILLED", file)
    given = {"data": products.load(f"runs:/{data}")}
    with stage_run("train", "tiny", {}, inputs=given, tags={"level": "L4"}) as run:
        model = run.log_model("L4", [file], tags={"pair": "tiny", "level": "L4"})
    assert model is not None
    registry.promote("tiny", "L4", model, lambda _: [], {})
    scenes = ended("FAILED", file)
    between = ended("FAILED", file, inputs={"dataset_dir": products.load(f"runs:/{scenes}")})
    with stage_run("benchmark", "tiny", {}, inputs={"data": products.load(f"runs:/{between}")}):
        pass
    store.client().delete_run(scenes)
    loose = ended("FAILED", file)
    assert clean.protected() >= {data, run.run_id, scenes, between}
    collect()
    assert all(folder_of(one).is_dir() for one in (data, scenes, between))
    assert is_deleted(loose) and not is_deleted(data)


def test_previous_champion_and_rollback_are_safe(file: Path) -> None:
    source = ended("FAILED", file)
    for text in ("one", "two"):
        path = file.with_name(f"{text}.safetensors")
        path.write_text(text)
        given = {"data": products.load(f"runs:/{source}")} if text == "one" else {}
        with stage_run("train", "tiny", {}, inputs=given, tags={"level": "L4"}) as run:
            model = run.log_model("L4", [path], tags={"pair": "tiny", "level": "L4"})
        assert model is not None
        registry.promote("tiny", "L4", model, lambda _: [], {})
    collect()
    assert folder_of(source).is_dir()
    registry.rollback("xsd-tiny-L4")


def test_artifacts_of_deleted_runs_go(file: Path) -> None:
    kept, dropped = ended("FINISHED", file), ended("FINISHED", file)
    store.client().delete_run(dropped)
    collect()
    assert folder_of(kept).is_dir() and not folder_of(dropped).exists()


def test_a_run_in_progress_and_what_it_reads_stay(file: Path, tmp_path: Path) -> None:
    data = ended("FAILED", file)
    work = tmp_path / "outputs" / "train" / ("train_" + "0" * 12)
    work.mkdir(parents=True)
    (work / "state").write_text("half")
    inputs = {"data": products.load(f"runs:/{data}")}
    with stage_run("train", "tiny", {}, inputs=inputs) as run:
        run.artifact(file)
        run.flush()
        collect()
        assert not is_deleted(run.run_id) and folder_of(run.run_id).is_dir()
        assert folder_of(data).is_dir() and work.is_dir()
    store.client().delete_run(run.run_id)
    collect()
    assert not work.exists()


def test_a_listed_run_that_came_back_is_kept(file: Path) -> None:
    run_id = ended("FAILED", file)
    (item,) = clean.find(0, Path("outputs"))
    store.client().set_terminated(run_id, "FINISHED")
    with pytest.raises(XsdError, match="is FINISHED now; it is kept"):
        clean.remove(item)
    assert folder_of(run_id).is_dir()


def test_work_folders_that_are_kept_or_read_stay(file: Path, tmp_path: Path) -> None:
    names = {"loose": "0" * 12, "linked": "1" * 12, "keyed": "2" * 12, "read": "3" * 12}
    place = {}
    for name, key in names.items():
        place[name] = tmp_path / "outputs" / "extract" / f"extract_{key}"
        place[name].mkdir(parents=True)
        (place[name] / "chunk").write_text(name)
    os.link(place["linked"] / "chunk", tmp_path / "an_artifact_of_another_store")
    with stage_run("extract", "tiny", {}, key=names["keyed"] + "f" * 52):
        pass
    by_path = products.from_path(place["read"])
    with stage_run("train", "tiny", {}, inputs={"data": by_path}):
        pass
    mine = tmp_path / "outputs" / "notes_of_mine"
    mine.mkdir()
    collect()
    assert not place["loose"].exists() and mine.is_dir()
    assert all(place[name].is_dir() for name in ("linked", "keyed", "read"))


def test_links_and_uris_that_lead_outside_are_left(file: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("!")
    root = store.local_root() / "tiny"
    experiment = store.experiment_id("tiny")
    root.mkdir(parents=True, exist_ok=True)
    (root / ("b" * 32)).symlink_to(precious)
    work = tmp_path / "outputs" / "train"
    work.mkdir(parents=True)
    (work / ("train_" + "0" * 12)).symlink_to(precious)
    run_id = ended("FAILED", file)
    outside = clean.Item("run", "x", "FAILED", run_id, precious, root)
    up = clean.Item("artifacts", "x", "gone", path=root / ".." / ".." / "precious", root=root)
    for item in (outside, up, clean.Item("artifacts", "x", "gone", path=root, root=root)):
        clean.remove(item)
    collect()
    assert (precious / "thesis").read_text() == "!" and root.is_dir()
    assert store.client().get_experiment(experiment).lifecycle_stage == "active"


def test_other_projects_in_the_store_are_not_touched(tmp_path: Path) -> None:
    client = store.client()
    other = client.create_experiment("theirs", artifact_location=(tmp_path / "theirs").as_uri())
    ids = [client.create_run(other).info.run_id for _ in range(3)]
    client.set_terminated(ids[0], "FAILED")
    client.delete_run(ids[1])
    for run_id in ids:
        (tmp_path / "theirs" / run_id / "artifacts").mkdir(parents=True)
    collect("--silent_hours", "0")
    assert all((tmp_path / "theirs" / run_id).is_dir() for run_id in ids)
    states = [client.get_run(run_id).info for run_id in ids]
    assert [(info.status, info.lifecycle_stage) for info in states] == [
        ("FAILED", "active"),
        ("RUNNING", "deleted"),
        ("RUNNING", "active"),
    ]


def test_caches_go_but_undelivered_writes_and_present_kernels_stay(kernels: Path) -> None:
    old = kernels.with_name("b" * 16)
    spooled, done = spool.root() / ("c" * 32), spool.root() / ("d" * 32)
    copy = products.downloads() / ("e" * 32)
    for folder in (old, spooled, done, copy):
        folder.mkdir(parents=True)
    (spooled / "writes.jsonl").write_text("{}\n")
    collect()
    assert kernels.is_dir() and spooled.is_dir()
    assert not any(folder.exists() for folder in (old, done, copy))


def test_stale_runs_are_told_and_closed(capsys: pytest.CaptureFixture[str]) -> None:
    client, experiment = store.client(), store.experiment_id("tiny")
    mine = store.this_process()
    host = mine.rsplit(":", 2)[0]
    long_ago = int((time.time() - 48 * 3600) * 1000)
    made = {}
    for name, process, start in (
        ("alive", mine, long_ago),
        ("gone", f"{host}:999999999:1", None),
        ("silent", "elsewhere:12:1", long_ago),
        ("measuring", "elsewhere:13:1", long_ago),
    ):
        tags = {"xsd.process": process, "stage": "train"}
        run = client.create_run(experiment, start_time=start, tags=tags, run_name=name)
        made[name] = run.info.run_id
    client.log_metric(made["measuring"], "system/cpu", 1.0)
    assert main(["gc"]) == 0
    shown = capsys.readouterr().out
    assert "process 999999999 of this host is gone" in shown
    assert "silent for 48 hours, of process 12 on elsewhere" in shown
    assert all(client.get_run(one).info.status == "RUNNING" for one in made.values())
    assert main(["gc", "--apply"]) == 0
    found = {name: client.get_run(one).info.status for name, one in made.items()}
    assert found == {
        "alive": "RUNNING",
        "gone": "KILLED",
        "silent": "KILLED",
        "measuring": "RUNNING",
    }


@pytest.mark.slow
def test_two_at_once_both_end_well(file: Path) -> None:
    ids = [ended("FAILED", file) for _ in range(5)]
    kept = ended("FINISHED", file)
    body = (
        "import sys; from pathlib import Path; from xsd.cli import main; from xsd.tracking import"
        " clean; clean._kernels = lambda: None;"
        " sys.exit(main(['gc', '--older_than_days', '0', '--apply']))"
    )
    both = [subprocess.Popen([sys.executable, "-c", body], stderr=subprocess.PIPE) for _ in "ab"]
    assert [(one.communicate(timeout=300)[1], one.returncode)[1] for one in both] == [0, 0]
    assert all(is_deleted(run_id) for run_id in ids)
    assert folder_of(kept).is_dir()


def test_usage_by_stage_and_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = ended("FINISHED", file)
    assert main(["gc", "--usage"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].split()[:2] == ["train", "1"] and run_id in shown
    assert main(["gc", "--usage", "--apply"]) == 2

"""Stages where there is no MLflow, and what they recorded as runs afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from xsd.cli import main
from xsd.errors import XsdError
from xsd.tracking import records, store
from xsd.tracking.products import Product


def recorded(root: Path, stage: str, value: float, pair: str = "lab") -> records.FolderRun:
    given = {"data": Product("somewhere", root, "abc")}
    with records.record(root, stage, pair, {"seed": 0}, given, {"level": "E1"}, "k") as run:
        run.log({"loss": value, "accept@0.90": 0.5, "bad": float("nan")}, step=3)
        path = root.parent / "weights.safetensors"
        path.write_bytes(b"weights")
        run.artifact(path, "models")
        note = root.parent / "note.md"
        note.write_text("seen")
        run.artifact(note)
    return run


def test_a_later_stage_finds_what_an_earlier_one_left(tmp_path: Path) -> None:
    root = tmp_path / "records"
    recorded(root, "train", 1.0)
    run = recorded(root, "train", 2.0)
    found = records.newest(root, "train", "lab", {"level": "E1", "cfg.seed": "0"})
    assert found.path == run.path / "artifacts"
    assert (found.path / "models/weights.safetensors").read_bytes() == b"weights"
    with pytest.raises(XsdError, match="no finished record of stage extract"):
        records.newest(root, "extract", "lab", {})


def test_records_become_runs_that_say_what_is_missing(
    tmp_path: Path, tracking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "records"
    run = recorded(root, "train", 1.5)
    (run.path / "artifacts/models/weights.safetensors").unlink()
    assert main(["import-run", str(root)]) == 0
    assert "without 1 files" in capsys.readouterr().out
    client = store.client()
    (found,) = client.search_runs([store.experiment_id("lab")], "tags.stage = 'train'")
    assert found.info.status == "FINISHED" and found.info.run_name == "train E1"
    assert found.data.metrics == {"loss": 1.5, "accept_90": 0.5}
    assert found.data.params["cfg.seed"] == "0" and found.data.tags["input.data"] == "somewhere"
    assert found.data.tags["xsd.not_kept"] == "models/weights.safetensors"
    assert found.data.tags["xsd.not_finite"] == "bad"
    kept = [artifact.path for artifact in client.list_artifacts(found.info.run_id)]
    assert kept == ["manifest.json", "note.md"]


def test_what_was_altered_or_never_ended_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "records"
    assert main(["import-run", str(root)]) == 2
    run = recorded(root, "train", 1.0)
    (run.path / "artifacts/note.md").unlink()
    (run.path / "artifacts/note.md").write_text("else")
    assert main(["import-run", str(root)]) == 2
    assert "not what manifest.json says" in capsys.readouterr().err

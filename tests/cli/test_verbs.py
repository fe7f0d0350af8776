from __future__ import annotations

from pathlib import Path

import pytest

from xsd.cli import main
from xsd.tracking import registry
from xsd.tracking.run import stage_run

pytestmark = pytest.mark.usefixtures("tracking")


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "best_model.safetensors"
    path.write_text("w")
    with stage_run("train", "tiny", {}, tags={"level": "L4"}) as run:
        run.artifact(path)
        return run.log_model("adapter", [path], tags={"pair": "tiny", "level": "L4"})


def test_registry_lists_champions(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["registry"]) == 0
    assert "no adapter" in capsys.readouterr().out
    tags = {"metric": "accepted_prefix_22", "accept_length": 5.5}
    registry.promote("tiny", "L4", model, lambda _: [], tags)
    assert main(["registry"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:5] == ["xsd-tiny-L4", "1", "champion", "accepted_prefix_22", "5.5"]


def test_registry_shows_and_rolls_back(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = {"metric": "accepted_prefix_22", "accept_length": 5.5, "dataset_digest": "d1"}
    registry.promote("tiny", "L4", model, lambda _: [], tags)
    refused = {"champion": "models:/xsd-tiny-L4@champion", "promoted": "false", "reasons": "worse"}
    with stage_run("promote", "tiny", {}, tags=refused | {"input.candidate": "runs:/x"}):
        pass
    assert main(["registry", "show", "4"]) == 0
    shown = capsys.readouterr().out
    assert "xsd-tiny-L4 version 1 champion" in shown and "dataset_digest  d1" in shown
    assert "refused runs:/x: worse" in shown
    assert main(["registry", "rollback", "L4"]) == 2
    assert "no previous_champion" in capsys.readouterr().err
    other = tmp_path / "other" / "best_model.safetensors"
    other.parent.mkdir()
    other.write_text("other")
    with stage_run("train", "tiny", {}, tags={"level": "L4"}) as run:
        second = run.log_model("adapter", [other], tags={"pair": "tiny", "level": "L4"})
    registry.promote("tiny", "L4", second, lambda _: [], tags)
    assert main(["registry", "rollback", "xsd-tiny-L4"]) == 0
    assert "is version 1 again" in capsys.readouterr().out
    for words, message in (
        (["show"], "of what?"),
        (["show", "L9"], "unknown level"),
        (["show", "E1"], "no such registered model"),
        (["burn"], "one of list, show"),
    ):
        assert main(["registry", *words]) == 2
        assert message in capsys.readouterr().err


def test_lineage_walks_back(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", "--uri", f"models:/{model}"]) == 0
    assert capsys.readouterr().out.startswith(f"train L4  models:/{model}  run ")
    assert main(["lineage"]) == 2
    assert "no finished benchmark" in capsys.readouterr().err
    for name, message in (
        ("zzz", "no run and no file is called 'zzz'"),
        ("beef", "no run begins with 'beef'"),
        ("runs:/zzz", "runs:/zzz: missing: no such run"),
    ):
        assert main(["lineage", name]) == 2
        assert message in capsys.readouterr().err


def test_levels_name_the_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["levels", "--dim", "128"]) == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert "published no." in header
    assert first.split()[:2] == ["L1", "1"]

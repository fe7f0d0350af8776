from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from xsd.cli import main
from xsd.tracking import lineage, products, registry, store
from xsd.tracking.run import stage_run

pytestmark = pytest.mark.usefixtures("tracking")


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, str]:
    """scenes -> extract -> train -> champion -> benchmark; run ids by stage."""
    (tmp_path / "s").write_text("scenes")
    made = {}
    for stage, source in (("scenes", None), ("extract", "scenes")):
        inputs = {"dataset_dir": products.load(f"runs:/{made[source]}")} if source else None
        with stage_run(stage, "tiny", {"seed": 7}, inputs=inputs) as run:
            run.artifact(tmp_path / "s")
        made[stage] = run.run_id
    data = products.load(f"runs:/{made['extract']}")
    with stage_run("train", "tiny", {}, inputs={"data": data}, tags={"level": "L4"}) as run:
        model = run.log_model("L4", [tmp_path / "s"], tags={"pair": "tiny", "level": "L4"})
    made["train"] = run.run_id
    assert model is not None
    registry.promote("tiny", "L4", model, lambda _: [], {})
    champion = products.load(registry.champion_uri("tiny", "L4"))
    with stage_run("benchmark", "tiny", {}, inputs={"adapter.L4": champion, "data": data}) as run:
        pass
    return made | {"benchmark": run.run_id, "model": model}


def stages(node: lineage.Node) -> list[tuple[int, str, str]]:
    return [(depth, one.role, one.stage) for depth, one in node.walk()]


def test_up_from_a_benchmark_to_its_scenes(chain: dict[str, str]) -> None:
    found = lineage.up(f"runs:/{chain['benchmark']}")
    assert stages(found) == [
        (0, "", "benchmark"),
        (1, "adapter.L4", "train"),
        (2, "data", "extract"),
        (3, "dataset_dir", "scenes"),
        (1, "data", "extract"),
    ]
    assert [one.note for _, one in found.walk()][-1] == "shown above"


def test_down_from_scenes_to_benchmark_and_model_version(chain: dict[str, str]) -> None:
    found = lineage.down(chain["scenes"])
    assert stages(found) == [
        (0, "", "scenes"),
        (1, "as dataset_dir", "extract"),
        (2, "as data", "train"),
        (3, "registered", "model"),
        (3, "as adapter.L4", "benchmark"),
        (2, "as data", "benchmark"),
    ]
    versions = [one.uri for _, one in found.walk() if one.stage == "model"]
    assert versions == ["models:/xsd-tiny-L4/1 @champion"]


def test_an_alias_that_moved_does_not_change_the_past(
    chain: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "t").write_text("another")
    with stage_run("train", "tiny", {}, tags={"level": "L4"}) as other:
        model = other.log_model("L4", [tmp_path / "t"], tags={"pair": "tiny", "level": "L4"})
    assert model is not None
    assert registry.promote("tiny", "L4", model, lambda _: [], {}).version == 2
    adapter = lineage.up(f"runs:/{chain['benchmark']}").children[0]
    assert adapter.run_id == chain["train"] != other.run_id


@pytest.mark.parametrize("part", ["", "sub", "a"])
def test_a_path_leads_to_the_run_that_made_what_lies_there(tmp_path: Path, part: str) -> None:
    """The whole folder, a folder in it, or one file; a copy of it, too."""
    made, given = tmp_path / "made", tmp_path / "given"
    (made / "sub").mkdir(parents=True)
    for name in ("a", "sub/b", "sub/c"):
        (made / name).write_text(f"of {name}")
    (tmp_path / "curve.html").write_text("drawn")
    with stage_run("extract", "tiny", {}) as extract:
        extract.artifacts(made)
        extract.artifact(tmp_path / "curve.html", "figures")
    shutil.copytree(made, given)
    with stage_run("train", "tiny", {}, inputs={"data": products.load(given / part)}) as run:
        pass
    assert lineage.up(run.uri).children[0].run_id == extract.run_id
    assert stages(lineage.down(extract.run_id)) == [(0, "", "extract"), (1, "as data", "train")]
    (given / "sub/b").write_text("altered")
    (given / "a").write_text("altered")
    with stage_run("train", "tiny", {}, inputs={"data": products.load(given / part)}) as other:
        pass
    assert lineage.up(other.uri).children[0].run_id == ""


def test_deleted_and_missing_sources_are_named(chain: dict[str, str]) -> None:
    store.client().delete_run(chain["extract"])
    store.client().set_tag(chain["train"], "input.gone", f"runs:/{'0' * 32}")
    store.client().set_tag(chain["train"], "input.path", "/no/such/file")
    notes = {one.uri: one.note for _, one in lineage.up(f"runs:/{chain['train']}").walk()}
    assert notes[f"runs:/{chain['extract']}"] == "deleted"
    assert notes[f"runs:/{chain['scenes']}"] == ""
    assert notes[f"runs:/{'0' * 32}"] == "missing: no such run"
    assert notes["/no/such/file"] == "missing: no such file here"
    assert (1, "as dataset_dir", "extract") in stages(lineage.down(chain["scenes"]))


def test_a_circle_ends(chain: dict[str, str]) -> None:
    store.client().set_tag(chain["scenes"], "input.odd", f"runs:/{chain['benchmark']}")
    assert any(one.note == "shown above" for _, one in lineage.up(f"runs:/{chain['train']}").walk())


def test_the_command(chain: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", chain["scenes"][:12], "--direction", "both", "--settings"]) == 0
    shown = capsys.readouterr().out
    assert f"environment python {platform.python_version()}, torch " in shown
    assert "seed = 7" in shown and "used by:" in shown
    assert f"benchmark  runs:/{chain['benchmark']}" in shown
    assert main(["lineage", "models:/xsd-tiny-L4@champion"]) == 0
    assert capsys.readouterr().out.startswith("train L4  models:/xsd-tiny-L4@champion  run ")
    for word, message in (
        ("0000abcd", "no run begins with"),
        ("models:/none@champion", "no such model"),
        (f"runs:/{'0' * 32}", "no such run"),
    ):
        assert main(["lineage", word]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_prefix_of_several_runs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    client, experiment = store.client(), store.experiment_id("tiny")
    ids = [client.create_run(experiment).info.run_id for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        runs = [client.get_run(run_id) for run_id in ids]
        patch.setattr(lineage, "_search", lambda *_, **__: runs)
        assert main(["lineage", "abcd"]) == 2
    error = capsys.readouterr().err
    assert all(run_id in error for run_id in ids)

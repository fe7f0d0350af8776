from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tracking.rivals import promote_at_once
from xsd.errors import XsdError
from xsd.tracking import products, registry, store
from xsd.tracking.run import stage_run

pytestmark = pytest.mark.usefixtures("tracking")


def train(tmp_path: Path, content: str = "w", level: str = "L4") -> str:
    path = tmp_path / "best_model.safetensors"
    path.unlink(missing_ok=True)
    path.write_text(content)
    tags = {"pair": "tiny", "level": level}
    with stage_run("train", "tiny", {}, tags={"level": level}) as run:
        return run.log_model("adapter", [path], tags=tags, metrics={"accepted_prefix_22": 5.0})


def agree(incumbent: object) -> list[str]:
    return []


def test_promotion_moves_the_alias_and_keeps_the_way_back(tmp_path: Path) -> None:
    assert registry.champion("tiny", "L4") is None
    first = registry.promote("tiny", "L4", train(tmp_path), agree, {"metric": 5.0})
    assert (first.version, first.promoted) == (1, True)
    model = train(tmp_path, "better")
    seen = []
    second = registry.promote(
        "tiny", "L4", model, lambda old: seen.append(old.tags["metric"]) or [], {"metric": 6.0}
    )
    assert seen == ["5.0"]
    assert second.version == 2
    previous = store.client().get_model_version_by_alias("xsd-tiny-L4", "previous_champion")
    assert int(previous.version) == 1
    opened = products.load(second.uri)
    assert (opened.path / "best_model.safetensors").read_text() == "better"
    assert opened.model_id == model
    known = store.client().get_logged_model(model).tags["mlflow.modelVersions"]
    assert json.loads(known) == [{"name": "xsd-tiny-L4", "version": 2}], "the UI's link to it"
    assert opened.tags["metric"] == "6.0"
    assert opened.tags["source_run"] == opened.run_id
    assert len(registry.versions("tiny")) == 2


def test_the_gate_keeps_the_incumbent(tmp_path: Path) -> None:
    registry.promote("tiny", "L4", train(tmp_path), agree, {})
    refused = registry.promote("tiny", "L4", train(tmp_path, "x"), lambda _: ["worse"], {})
    assert refused == registry.Promotion("xsd-tiny-L4", 1, promoted=False, reasons=("worse",))
    assert len(registry.versions()) == 1


def test_promoting_twice_changes_nothing(tmp_path: Path) -> None:
    model = train(tmp_path)
    registry.promote("tiny", "L4", model, agree, {})
    again = registry.promote("tiny", "L4", model, agree, {})
    assert (again.version, again.promoted, again.reasons) == (1, False, ())


def test_the_gate_is_asked_again_if_the_alias_moved(tmp_path: Path) -> None:
    """Another process promotes while our gate re-scores the incumbent."""
    mine, other = train(tmp_path), train(tmp_path, "other")
    asked = []

    def gate(incumbent: object) -> list[str]:
        asked.append(incumbent)
        if len(asked) == 1:
            registry.promote("tiny", "L4", other, agree, {})
        return [] if incumbent is None else ["not better"]

    outcome = registry.promote("tiny", "L4", mine, gate, {})
    assert (outcome.version, outcome.promoted) == (1, False)
    assert len(asked) == 2


def test_another_pair_or_level_is_refused_by_name(tmp_path: Path) -> None:
    model = train(tmp_path)
    with pytest.raises(XsdError, match="level is 'L4', not 'L1'"):
        registry.promote("tiny", "L1", model, agree, {})
    registry.promote("tiny", "L4", model, agree, {"drafter_dim": 96})
    uri = registry.champion_uri("tiny", "L4")
    assert products.load(uri, {"pair": "tiny", "drafter_dim": 96}).model_id == model
    with pytest.raises(XsdError, match="made for pair 'tiny', not 'real'"):
        products.load(uri, {"pair": "real"})
    with pytest.raises(XsdError, match="made for drafter_dim '96', not '4096'"):
        products.load(uri, {"drafter_dim": 4096})


def test_rollback_goes_back_and_can_be_undone(tmp_path: Path) -> None:
    with pytest.raises(XsdError, match="no previous_champion"):
        registry.rollback("xsd-tiny-L4")
    for content in ("first", "second"):
        registry.promote("tiny", "L4", train(tmp_path, content), agree, {})
    uri = registry.champion_uri("tiny", "L4")
    for expected in ("first", "second"):
        registry.rollback("xsd-tiny-L4")
        assert (products.load(uri).path / "best_model.safetensors").read_text() == expected
    rolled = {version.version: version.tags for version in registry.versions("tiny")}
    assert all("rolled_back" in tags for tags in rolled.values())


@pytest.mark.slow
def test_promotions_at_once_cannot_both_win(tmp_path: Path) -> None:
    models = {value: train(tmp_path, str(value)) for value in (1.0, 2.0, 3.0)}
    promote_at_once("tiny", models, tmp_path / "gate", [tmp_path] * 3)


LOCKED = """
import sys, time
from pathlib import Path
from xsd.tracking import registry
inside, log = Path(sys.argv[1]), []
for _ in range(3):
    with registry._server_lock("xsd-tiny-L4"):
        log.append(inside.exists())
        inside.touch()
        time.sleep(0.05)
        inside.unlink()
print(any(log))
"""


@pytest.mark.slow
def test_the_server_s_lock_holds_one_at_a_time(tmp_path: Path) -> None:
    """The lock between machines, on any store: here two processes that share no file lock."""
    command = [sys.executable, "-c", LOCKED, str(tmp_path / "inside")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0].strip() for process in processes] == ["False"] * 2


def test_a_dead_holder_s_lock_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    client = store.client()
    gone = store.this_process().replace(f":{os.getpid()}:", ":999999999:")
    client.create_registered_model("m.lock", tags={"process": gone})
    with registry._server_lock("m"):
        pass
    client.create_registered_model("m.lock", tags={"process": "elsewhere:1:1"})
    monkeypatch.setattr(registry, "_LOCK_SECONDS", 0.2)
    with pytest.raises(XsdError, match="another machine"), registry._server_lock("m"):
        pass
    late = time.time() + 61
    monkeypatch.setattr(registry, "_LOCK_SECONDS", 60.0)
    monkeypatch.setattr("xsd.tracking.registry.time.time", lambda: late)
    with registry._server_lock("m"):
        pass


def test_an_altered_model_is_refused(tmp_path: Path) -> None:
    uri = registry.promote("tiny", "L4", train(tmp_path), agree, {}).uri
    path = products.load(uri).path / "best_model.safetensors"
    path.write_text("evil")
    with pytest.raises(XsdError, match="missing or was altered"):
        products.load(uri)


def test_models_compare_by_metric(tmp_path: Path) -> None:
    model = train(tmp_path)
    found = store.client().search_logged_models(
        store.experiment_ids(), "tags.level = 'L4' AND metrics.accepted_prefix_22 > 4"
    )
    assert [item.model_id for item in found] == [model]

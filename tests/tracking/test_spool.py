"""A tracking server that is killed and comes back, and what a run loses by it: nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.server import Server
from tests.tracking.test_credentials import LEAKS, PASSWORD, is_clean
from xsd.cli import main
from xsd.errors import XsdError
from xsd.tracking import products, query, spool, store
from xsd.tracking.run import stage_run


@pytest.fixture
def server(_initialised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Runs already; the current folder holds what this machine keeps."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copyfile(_initialised, folder / "mlflow.db")
    made = Server(folder)
    made.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(spool, "_RETRY_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    yield made
    made.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_mid_run_misses_nothing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "best_model.safetensors"
    weights.write_bytes(b"first")
    with stage_run("train", "tiny", {"seed": 0}, key="k") as run:
        run.log({"loss": 3.0}, step=0)
        run.flush()
        server.kill()
        before_ms = int(time.time() * 1000)
        run.log({"loss": 2.0}, step=1)
        run.flush()
        after_ms = int(time.time() * 1000)
        run.tag({"level": "L4"})
        run.artifact(weights)
        assert run.log_model("adapter", [weights], metrics={"val.loss": 2.0}) is None
        weights.unlink()
    said = capsys.readouterr().err
    assert said.count("does not answer") == 1 and str(run.outbox.folder) in said
    assert run.outbox.has_undelivered
    assert main(["deliver"]) == 2
    store._client.cache_clear()
    with pytest.raises(XsdError, match="does not answer"), stage_run("train", "tiny", {}):
        pass

    server.start()
    assert spool.pending() == [run.run_id]
    time.sleep(0.01)
    delivered_ms = int(time.time() * 1000)
    assert main(["deliver"]) == 0
    assert "delivered" in capsys.readouterr().err
    assert spool.pending() == [] and not run.outbox.folder.exists()
    found = store.client().get_run(run.run_id)
    points = store.client().get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(0, 3.0), (1, 2.0)]
    assert before_ms <= points[1].timestamp <= after_ms
    assert found.info.status == "FINISHED"
    assert after_ms <= found.info.end_time < delivered_ms
    tags = found.data.tags
    assert tags["level"] == "L4" and tags["xsd.key"] == "k"
    assert tags["xsd.spooled_since"] and "writes at" in tags["xsd.delivered"]
    model = products.load(f"models:/{tags['xsd.model_id']}")
    assert (model.path / weights.name).read_bytes() == b"first"
    assert query.history([run.run_id], ["val.loss"])["value"].tolist() == [2.0]


@pytest.mark.slow
def test_a_server_that_comes_back_gets_all_in_order(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("{}")
    with stage_run("main", "tiny", {}) as outer, stage_run("train", "tiny", {}) as run:
        server.kill()
        for step in range(3):
            run.log({"loss": float(step)}, step)
            run.flush()
        run.artifact(tmp_path / "a.json")
        server.start()
        run.log({"loss": 3.0}, 3)
        run.flush()
        assert not run.outbox.has_undelivered
    assert query.history([run.run_id], ["loss"])["step"].tolist() == [0, 1, 2, 3]
    assert products.load(f"runs:/{run.run_id}/a.json").path.read_text() == "{}"
    tags = store.client().get_run(run.run_id).data.tags
    assert "xsd.spooled_since" in tags and "xsd.delivered" in tags
    assert "xsd.spooled_since" not in store.client().get_run(outer.run_id).data.tags
    assert "missed" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_left_goes_out_with_the_next_run(server: Server) -> None:
    with stage_run("train", "tiny", {}) as first:
        server.kill()
        first.log({"loss": 1.0})
    # A process that was killed while it wrote left half a line.
    with (first.outbox.folder / "writes.jsonl").open("a") as handle:
        handle.write('{"kind": "ba')
    server.start()
    with stage_run("train", "tiny", {}):
        pass
    assert store.client().get_run(first.run_id).data.metrics == {"loss": 1.0}
    assert store.client().get_run(first.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_write_that_is_refused_is_kept(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with stage_run("train", "tiny", {"seed": 0}) as run:
        server.kill()
        run.log({"loss": 1.0})
    lines = (run.outbox.folder / "writes.jsonl").read_text().splitlines()
    bad = {"kind": "batch", "metrics": [], "params": {"cfg.seed": "1"}, "tags": {}}
    (run.outbox.folder / "writes.jsonl").write_text("\n".join([*lines[:-1], json.dumps(bad), ""]))
    server.start()
    assert main(["deliver"]) == 2
    assert "refuses write" in capsys.readouterr().err
    assert run.outbox.has_undelivered
    assert store.client().get_run(run.run_id).data.metrics == {"loss": 1.0}


@pytest.mark.slow
def test_no_credential_is_spooled_or_delivered(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The server's own, in its address, and those that a run was given."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("://", f"://me:{PASSWORD}@"))
    with stage_run("train", "tiny", {"data": LEAKS[0]}) as run:
        server.kill()
        run.say(f"reads {LEAKS[1]}")
        run.tag({"note": LEAKS[2]})
        run.dataset("scenes", "d", LEAKS[3], "train")
        (tmp_path / "w").write_bytes(b"w")
        run.log_model("L4", [tmp_path / "w"], params={"from": LEAKS[4]}, tags={"at": LEAKS[0]})
    kept = [file.read_text() for file in run.outbox.folder.rglob("*") if file.is_file()]
    assert len(kept) == 3 and sum(text.count("***") for text in kept) >= 6
    assert all(map(is_clean, kept))
    assert main(["deliver"]) == 2, "the server is away"
    server.start()
    assert main(["deliver"]) == 0
    assert store.client().get_run(run.run_id).data.tags["note"] != LEAKS[2]
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert is_clean(file.read_bytes().decode("latin-1")), file
    assert is_clean("".join(capfd.readouterr()))

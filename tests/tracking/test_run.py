from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from xsd.errors import XsdError
from xsd.tracking import figures, lineage, products, query, store
from xsd.tracking.run import active, stage_run

pytestmark = pytest.mark.usefixtures("tracking")


def fetch(run_id: str):
    return store.client().get_run(run_id)


def script(body: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(body)]


def test_a_run_is_named_tagged_and_finished() -> None:
    with stage_run("train", "tiny", {"lr": 0.1, "x": ""}, tags={"level": "L4", "no": None}) as run:
        assert active() is run
    found = fetch(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "train L4"
    assert found.data.params == {"cfg.lr": "0.1", "cfg.x": "''"}
    tags = found.data.tags
    assert (tags["stage"], tags["pair"], tags["level"]) == ("train", "tiny", "L4")
    assert "no" not in tags
    assert store.client().get_experiment(run.experiment_id).name == "xsd/tiny"
    assert active() is None


def test_children_join_their_parent_also_from_threads() -> None:
    ids: list[str] = []

    def trial(parent: str) -> None:
        with stage_run("trial", "tiny", {}, parent=parent) as run:
            ids.append(run.run_id)

    with stage_run("main", "tiny", {}) as outer:
        with stage_run("train", "tiny", {}) as inner:
            ids.append(inner.run_id)
        thread = threading.Thread(target=trial, args=(outer.run_id,))
        thread.start()
        thread.join()
    assert [fetch(id_).data.tags["mlflow.parentRunId"] for id_ in ids] == [outer.run_id] * 2
    assert set(query.runs(parent=outer.run_id)["run_id"]) == set(ids)


def test_every_run_names_its_user_as_mlflow_does(monkeypatch: pytest.MonkeyPatch) -> None:
    store.user.cache_clear()
    monkeypatch.setenv("LOGNAME", "ada")
    with stage_run("main", "tiny", {}) as outer, stage_run("train", "tiny", {}) as inner:
        pass
    for run in (outer, inner):
        found = fetch(run.run_id)
        assert found.data.tags["mlflow.user"] == found.info.user_id == "ada"

    store.user.cache_clear()
    monkeypatch.setattr("getpass.getuser", lambda: {}["no such user id"])
    with stage_run("main", "tiny", {}) as nameless:
        pass
    assert "mlflow.user" not in fetch(nameless.run_id).data.tags
    store.user.cache_clear()


def test_the_launchers_run_is_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client = store.client()
    launched = client.create_run(store.experiment_id("tiny")).info.run_id
    client.log_param(launched, "level", "'4'")
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    with stage_run("main", "tiny", {"level": "L4"}) as run:
        assert run.run_id == launched
        with stage_run("train", "tiny", {}) as inner:
            assert inner.run_id != launched
    assert fetch(launched).data.params == {"level": "'4'", "cfg.level": "L4"}
    assert fetch(launched).info.run_name == "main"


class Pruned(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("a\nb"), "FAILED"),
        (XsdError("no"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
        (Pruned(), "KILLED"),
    ],
)
def test_the_status_says_how_it_ended(error: BaseException, status: str) -> None:
    with (
        pytest.raises(type(error)),
        stage_run("train", "tiny", {}, key="k", killed_by=(Pruned,)) as run,
    ):
        run.log({"loss": 1.0})
        raise error
    found = fetch(run.run_id)
    assert found.info.status == status
    assert found.data.metrics == {"loss": 1.0}
    assert "xsd.key" not in found.data.tags
    assert (found.data.tags.get("xsd.error") == "a b") == isinstance(error, RuntimeError)


def test_sigterm_kills_the_run() -> None:
    child = subprocess.Popen(
        script(
            """
            import time
            from xsd.tracking.run import stage_run
            with stage_run("train", "tiny", {}) as run:
                print(run.run_id, flush=True)
                time.sleep(60)
            """
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    run_id = child.stdout.readline().strip()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=120) == 143
    assert fetch(run_id).info.status == "KILLED"


def test_a_run_whose_process_is_gone_is_reaped() -> None:
    body = """
        import os
        from xsd.tracking.run import stage_run
        with stage_run("train", "tiny", {}) as run:
            print(run.run_id, flush=True)
            os._exit(1)
        """
    done = subprocess.run(script(body), capture_output=True, text=True, check=False)
    run_id = done.stdout.strip()
    assert fetch(run_id).info.status == "RUNNING"
    with stage_run("train", "tiny", {}) as mine:
        assert fetch(run_id).info.status == "KILLED"
        assert fetch(mine.run_id).info.status == "RUNNING"


def test_a_fresh_store_is_made_once_by_many(tmp_path: Path) -> None:
    body = "from xsd.tracking.run import stage_run\nwith stage_run('train', 'tiny', {}): pass"
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/fresh.db"}
    children = [
        subprocess.Popen([sys.executable, "-c", body], env=env, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors.decode()


def test_a_server_that_refuses_or_is_silent_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "_PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with pytest.raises(XsdError, match="does not answer"), stage_run("train", "tiny", {}):
            pass
    start = time.monotonic()
    with pytest.raises(XsdError, match="does not answer") as caught, stage_run("a", "tiny", {}):
        pass
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_the_store_is_anchored_to_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "MLproject").touch()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert store.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


def test_metrics_are_buffered_renamed_and_finite() -> None:
    with stage_run("train", "tiny", {}) as run:
        for step in range(1500):
            run.log({"accept@0.90": step, "loss": math.nan if step == 7 else 1.0}, step)
    curve = query.history([run.run_id], ["accept_90"])
    assert curve["step"].tolist() == list(range(1500))
    assert len(query.history([run.run_id], ["loss"])) == 1499
    assert fetch(run.run_id).data.tags["xsd.not_finite"] == "loss"


def test_large_files_are_on_disk_once(tmp_path: Path) -> None:
    chunk = tmp_path / "data" / "chunks" / "a.safetensors"
    chunk.parent.mkdir(parents=True)
    chunk.write_bytes(b"x" * 1000)
    (tmp_path / "data" / ".hidden").write_text("no")
    with stage_run("extract", "tiny", {}) as run:
        run.artifacts(tmp_path / "data", "store")
        run.artifacts(tmp_path / "data", "store")
    kept = products.load(f"runs:/{run.run_id}/store/chunks").path / "a.safetensors"
    assert kept.stat().st_ino == chunk.stat().st_ino
    assert kept.stat().st_nlink == 2
    assert run.folder is not None
    names = {path.name for path in run.folder.rglob("*")}
    assert names == {"store", "chunks", "a.safetensors", "manifest.json"}


def test_missing_artifacts_are_refused(tmp_path: Path) -> None:
    with stage_run("extract", "tiny", {}) as run:
        with pytest.raises(XsdError, match="no such file"):
            run.artifact(tmp_path / "nothing")
        with pytest.raises(XsdError, match="no such folder"):
            run.artifacts(tmp_path / "nothing")


def test_figures_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from choreographer.browsers.chromium import Chromium

    figures._browser_found.cache_clear()
    monkeypatch.setattr(Chromium, "find_browser", lambda **_: None)
    with stage_run("evaluate", "tiny", {}) as run:
        drawn = {"curve": go.Figure(go.Scatter(y=[1, 2])), "other": go.Figure()}
        written = run.figures(drawn, tmp_path)
        assert run.figures(drawn) == []
    assert [path.name for path in written] == ["evaluate.html"]
    html = written[0].read_text()
    assert "<script src=" not in html
    assert re.findall(r'<section id="(\w+)">', html) == ["curve", "other"]
    assert len(html) < 1.2 * len(get_plotlyjs()), "its script is there once"
    assert capsys.readouterr().err.count("no browser") == 1
    assert set(run.manifest) == {"figures/evaluate.html"}


def test_tables_come_back() -> None:
    frame = pd.DataFrame({"key": ["a", "b"], "value": [1.5, None]})
    with stage_run("benchmark", "tiny", {}) as run:
        run.table("samples", frame)
    pd.testing.assert_frame_equal(query.table(run.run_id, "samples"), frame, check_dtype=False)
    logged = json.loads(fetch(run.run_id).data.tags["mlflow.loggedArtifacts"])
    assert logged == [{"path": "tables/samples.json", "type": "table"}]


def test_datasets_and_inputs_are_linked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with stage_run("extract", "tiny", {}) as first:
        first.artifact(tmp_path / "a.txt")
        first.dataset("scenes", "d" * 64, "somewhere", "train")
    given = products.load(first.uri)
    with stage_run("train", "tiny", {}, inputs={"data": given}) as run:
        pass
    found = fetch(run.run_id)
    assert found.data.tags["input.data"] == first.uri
    assert found.data.tags["digest.data"] == given.digest
    (dataset,) = fetch(first.run_id).inputs.dataset_inputs
    assert (dataset.dataset.name, len(dataset.dataset.digest)) == ("scenes", 36)
    assert [node.stage for _, node in lineage.up(run.uri).walk()] == ["train", "extract"]


def test_the_link_opens_the_right_page() -> None:
    with stage_run("main", "tiny", {}) as run:
        assert run.link().endswith(f"/runs/{run.run_id}?workflowType=machine_learning")

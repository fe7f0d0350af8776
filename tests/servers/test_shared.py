"""Train, sweep, promote and benchmark against one server, as several people would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import psycopg2
import pytest

from tests.commands.conftest import World, xsd
from tests.servers.conftest import PASSWORD, SECRET, Server
from tests.tracking.rivals import promote_at_once
from xsd.tracking import figures, products, query, registry, store
from xsd.tracking.run import stage_run

SPACE = "learning_rate: {type: float, low: 1.0e-3, high: 1.0e-2, log: true}\n"


@pytest.fixture
def workplace(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder whose store is the server; a client has no other credentials."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(figures, "_browser_found", lambda: False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def finished(stage: str) -> list[Any]:
    condition = f"tags.stage = '{stage}' AND attributes.status = 'FINISHED'"
    return list(store.client().search_runs(store.experiment_ids(), condition))


def everything(server: Server) -> bytes:
    """All that clients left: the database's text, and the bucket's files."""
    rows: list[bytes] = []
    with psycopg2.connect(server.database) as connection, connection.cursor() as cursor:
        for table in ("params", "tags", "runs", "experiments", "model_version_tags"):
            cursor.execute(f"SELECT * FROM {table}")
            rows += [str(row).encode() for row in cursor.fetchall()]
    return b"\n".join([*rows, *objects(server).values()])


def dump(database: str) -> str:
    """Every row of every table."""
    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        names = [name for (name,) in cursor.fetchall()]
        rows = []
        for name in names:
            cursor.execute(f'SELECT * FROM "{name}"')
            rows += [f"{name}: {row}" for row in cursor.fetchall()]
    return "\n".join(rows)


def objects(server: Server) -> dict[str, bytes]:
    keys = {"aws_access_key_id": "xsd", "aws_secret_access_key": SECRET}
    client = boto3.client("s3", endpoint_url=server.bucket_url, region_name="us-east-1", **keys)
    listed = client.get_paginator("list_objects_v2").paginate(Bucket="xsd")
    names = [item["Key"] for page in listed for item in page.get("Contents", ())]
    return {name: client.get_object(Bucket="xsd", Key=name)["Body"].read() for name in names}


def another_database(server: Server, name: str) -> str:
    """A database beside the server's own."""
    connection = psycopg2.connect(server.database)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
    connection.close()
    address = server.database.rpartition("/")[0].replace("postgresql:", "postgresql+psycopg2:")
    return f"{address}/{name}"


def test_train_sweep_promote_benchmark(
    server: Server, world: World, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xsd("train", *world.train_flags, "--level", "E1", "--max_positions", 80)
    [trained] = finished("train")
    (workplace / "space.yaml").write_text(SPACE)
    monkeypatch.setenv("XSD_STORAGE", another_database(server, "studies"))
    words = ["--level", "L1", "--space", "space.yaml", "--num_trials", 3, "--num_workers", 2]
    xsd("sweep", *world.train_flags, *words)
    [sweep] = finished("sweep")
    trials = query.table(sweep.info.run_id, "trials")
    assert sorted(trials["number"]) == [0, 1, 2] and set(trials["state"]) <= {"complete", "pruned"}
    processes = {run.data.tags["xsd.process"] for run in finished("trial")}
    # On a busy machine one of the two may have taken them all.
    assert len(processes) in (1, 2) and sweep.data.tags["xsd.process"] not in processes
    given = ["--dataset_dir", world.scenes, "--num_answers", 1]
    xsd("promote", *world.pair_flags, "--candidate", f"runs:/{trained.info.run_id}", *given)
    champion = registry.champion(world.pair.pair, "E1")
    assert champion is not None and champion.run_id == trained.info.run_id
    words = ["--dataset_dir", world.scenes, "--data", world.data, "--configs", "E1_decode"]
    words += ["--max_samples", 2, "--repeats", 1, "--warmup", 0, "--max_new_tokens", 8]
    xsd("benchmark", *world.pair_flags, *words)
    [measured] = finished("benchmark")
    assert measured.data.tags["lossless"] == "true"
    assert measured.data.metrics["measured.E1_decode.speedup"] > 0
    assert measured.data.tags["input.adapter.E1"].startswith("models:/")

    # Nothing went past the server.
    assert all(run.info.artifact_uri.startswith("mlflow-artifacts:") for run in finished("trial"))
    kept = objects(server)
    assert any(name.endswith("best_model.safetensors") for name in kept)
    assert any("e2e_wallclock_" in name for name in kept)
    assert len(query.table(measured.info.run_id, "benchmark")) == 2
    loaded = products.load(registry.champion_uri(world.pair.pair, "E1"))
    assert (loaded.path / "best_model.safetensors").is_file()
    for secret in (PASSWORD, SECRET):
        assert secret.encode() not in everything(server)
        assert secret not in server.log.read_text()


def test_promotions_at_once_cannot_both_win(server: Server, workplace: Path) -> None:
    """In folders of their own, as on several machines: the server's lock alone is between them."""
    weights = workplace / "best_model.safetensors"
    told = {"pair": "rivals", "level": "L4"}
    models, folders = {}, []
    for value in (1.0, 2.0, 3.0):
        weights.write_text(str(value))
        with stage_run("train", "rivals", {}, tags={"level": "L4"}) as run:
            models[value] = str(run.log_model("adapter", [weights], tags=told))
        folders.append(workplace / str(value))
        folders[-1].mkdir()
    promote_at_once("rivals", models, workplace / "gate", folders)
    with psycopg2.connect(server.database) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT name FROM registered_models WHERE name LIKE '%.lock'")
        assert cursor.fetchall() == []


@pytest.mark.parametrize("way", ["server", "database"])
def test_the_password_of_the_tracking_uri_is_nowhere(
    way: str,
    server: Server,
    world: World,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Userinfo before the server's name, or PostgreSQL without a server in between."""
    uri = server.uri.replace("://", f"://me:{PASSWORD}@")
    database = server.database
    if way == "database":
        uri = another_database(server, "direct")
        database = uri.replace("+psycopg2", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    xsd("train", *world.train_flags, "--level", "L1", "--num_epochs", 1, "--rerun")
    trained = finished("train")[0].info.run_id
    given = ["--checkpoint", f"runs:/{trained}", "--data", world.data, "--lm_head", world.head]
    xsd("evaluate", *world.pair_flags, *given)
    xsd("report", "--pair", world.pair.pair, "--runs", f"{finished('evaluate')[0].info.run_id}")
    xsd("report", "--pair", world.pair.pair, "--runs", f"{uri}/nope", expect=2)
    xsd("lineage", trained)
    said = "".join(capfd.readouterr())
    html = (workplace / "outputs/report/report.html").read_text()
    rows = dump(database)
    assert trained in rows and trained in said and "Levels, offline" in html
    assert PASSWORD not in said
    assert PASSWORD not in rows
    assert PASSWORD.encode() not in everything(server)
    for file in (file for file in workplace.rglob("*") if file.is_file()):
        assert PASSWORD.encode() not in file.read_bytes(), file

"""A real MLflow server: PostgreSQL for its runs, an S3-compatible store for its artifacts."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import world

__all__ = ["world"]

# Of services that live as long as the test.
PASSWORD = "not-for-any-log"
SECRET = "nor-is-this"
_PATIENCE = 60.0


@dataclass(frozen=True)
class Server:
    """Where the services are. Clients are told ``uri`` alone."""

    uri: str
    database: str
    bucket_url: str
    log: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(answers: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
    """Until it answers; fails early where its process has ended."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if answers():
            return
        assert process.poll() is None, f"{what} ended with {process.returncode}"
        time.sleep(0.1)
    raise AssertionError(f"{what} does not answer after {_PATIENCE:.0f} s")


def _programs() -> Path | None:
    """Debian keeps PostgreSQL's server programs out of the path."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    best = Path(on_path) if on_path else found[-1] if found else None
    return best.parent if best else None


def _owner() -> dict[str, Any]:
    """PostgreSQL refuses to be run by root."""
    return {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """URI of a new PostgreSQL cluster on loopback, with a password."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("there is no user postgres, and PostgreSQL does not run as root")
    # Not below pytest's own folder: that is closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="xsd-postgres-"))
    secret = folder / "secret"
    secret.write_text(PASSWORD)
    if os.geteuid() == 0:
        for path in (folder, secret):
            shutil.chown(path, "postgres", "postgres")
    data, port = folder / "data", free_port()
    make = [programs / "initdb", "-D", data, "-U", "xsd", "-A", "scram-sha-256", "-E", "UTF8"]
    make += [f"--pwfile={secret}", "--no-sync", "--locale=C"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **_owner())
    settings = {"listen_addresses": "127.0.0.1", "port": port, "fsync": "off"}
    settings["unix_socket_directories"] = folder
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [programs / "postgres", "-D", data, *map(str, words)],
            stdout=log, stderr=log, cwd=folder, **_owner(),
        )  # fmt: skip
        uri = f"postgresql://xsd:{PASSWORD}@127.0.0.1:{port}/postgres"
        try:
            wait_for(lambda: _answers_sql(uri), "PostgreSQL", process)
            yield uri
        finally:
            _stop(process)
            shutil.rmtree(folder, ignore_errors=True)


def _answers_sql(uri: str) -> bool:
    import psycopg2

    with suppress(psycopg2.OperationalError):
        psycopg2.connect(uri).close()
        return True
    return False


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Endpoint of an S3-compatible store with an empty bucket ``xsd``."""
    import boto3
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        url = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "xsd", "aws_secret_access_key": SECRET}
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="xsd")
        yield url
    finally:
        store.stop()


@pytest.fixture(scope="session")
def server(
    database: str, bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """``mlflow server`` as docs/server.md starts it."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": database.replace("postgresql:", "postgresql+psycopg2:"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_S3_ENDPOINT_URL": bucket,
        "AWS_ACCESS_KEY_ID": "xsd",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--artifacts-destination", "s3://xsd/artifacts"]
    uri = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(lambda: _answers_http(f"{uri}/health"), "the MLflow server", process)
            yield Server(uri, database, bucket, folder / "log")
        finally:
            _stop(process, group=True)


def _answers_http(url: str) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(url, timeout=2).close()
        return True
    return False


def _stop(process: subprocess.Popen[bytes], group: bool = False) -> None:
    """SIGINT: PostgreSQL's fast shutdown, and what a server is ended with by hand."""
    if process.poll() is None:
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

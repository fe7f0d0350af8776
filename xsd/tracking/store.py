"""Where runs are kept: the project's own database unless ``MLFLOW_TRACKING_URI`` says otherwise."""

from __future__ import annotations

import logging
import os
import platform
import socket
import sqlite3
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.errors import XsdError
from xsd.tracking.credentials import redacted

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT_PREFIX = "xsd/"
_PROBE_SECONDS = 8.0
_LOCK_SECONDS = 120.0
_SQLITE = b"SQLite format 3\0"


def project_root() -> Path:
    """The nearest folder, from here upwards, that holds an ``MLproject``; else this folder."""
    here = Path.cwd()
    marked = (folder for folder in (here, *here.parents) if (folder / "MLproject").is_file())
    return next(marked, here)


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or a database in the project whatever the current folder is."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def client() -> MlflowClient:
    """A client of the store, which is initialised if it is new.

    Raises:
        XsdError: the tracking server does not answer.
    """
    uri = tracking_uri()
    opened = _client(uri)
    import mlflow

    # Artifact and model URIs are resolved by mlflow through its global setting.
    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
    return opened


@lru_cache(maxsize=8)
def _client(uri: str) -> MlflowClient:
    _refuse_a_silent_server(uri)
    _refuse_no_database(uri)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    _hasten_sqlite()
    try:
        # A fresh database, opened by several processes at once, fails in all but one of them.
        with lock("store"):
            opened = MlflowClient(tracking_uri=uri)
            opened.search_experiments(max_results=1)
    except MlflowException as error:
        line = " ".join(str(error).split())
        raise XsdError(
            redacted(f"tracking store {uri}: {line}; check MLFLOW_TRACKING_URI")
        ) from error
    return opened


@lru_cache(maxsize=1)
def _hasten_sqlite() -> None:
    """A commit waits for the disk once, if at all, not four times: it goes to a write-ahead log.

    A loss of power may take the last commits with it, but never harms the database.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def tune(connection: Any, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")

    event.listen(Engine, "connect", tune)


def is_server(uri: str) -> bool:
    return urllib.parse.urlparse(uri).scheme in ("http", "https")


def answers() -> bool:
    """Whether the tracking server is there; a database of our own always is."""
    return not is_server(tracking_uri()) or _silence(tracking_uri()) is None


def is_outage(error: BaseException) -> bool:
    """Whether the tracking server is away or broken, and the same call may succeed later."""
    if not is_server(tracking_uri()):
        return False
    import requests
    from mlflow.exceptions import MlflowException

    is_about_the_server = False
    cause: BaseException | None = error
    while cause is not None:
        is_about_the_server |= isinstance(cause, MlflowException | requests.RequestException)
        response = getattr(cause, "response", None)
        if getattr(response, "status_code", 0) >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return True
        if isinstance(cause, requests.ConnectionError | requests.Timeout):
            return True
        cause = cause.__cause__ or cause.__context__
    return is_about_the_server and not answers()


def _refuse_a_silent_server(uri: str) -> None:
    if not is_server(uri):
        return
    # MLflow itself would retry every call for minutes; what is lost is spooled here.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Its links open another view than ours.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if (reason := _silence(uri)) is not None:
        raise XsdError(
            f"tracking server {redacted(uri)} does not answer ({reason});"
            " start it, or unset MLFLOW_TRACKING_URI to use the project's own store"
        )


def _silence(uri: str) -> str | None:
    """Why a server does not answer one short question; None: it does."""
    parts = urllib.parse.urlsplit(uri)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    try:
        urllib.request.urlopen(plain.geturl(), timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        # It answered: authentication is MLflow's business.
        return str(error) if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR else None
    except (urllib.error.URLError, OSError) as error:
        return str(getattr(error, "reason", error))
    return None


def _refuse_no_database(uri: str) -> None:
    """MLflow would try for minutes to open a file that is none, or where none can be made."""
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    advice = "choose another MLFLOW_TRACKING_URI"
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as handle:
            if handle.read(len(_SQLITE)) != _SQLITE:
                raise XsdError(f"tracking store {uri}: {path} is no database; {advice}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise XsdError(f"tracking store {uri}: {path.parent} cannot be written; {advice}")


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold a named lock against other processes that use the same store."""
    from filelock import FileLock, Timeout

    path = local_root() / f".{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=_LOCK_SECONDS):
            yield
    except Timeout as error:
        raise XsdError(f"{path}: held by another process for too long; end that one") from error


def local_root() -> Path:
    """Where this machine keeps what belongs to the store: artifacts, locks, undelivered writes."""
    uri = tracking_uri()
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns"
    return project_root() / "mlruns"


def ui_command() -> str:
    """How to open the UI; a password stays in the environment."""
    uri = tracking_uri()
    if is_server(uri):
        return f"at {redacted(uri)}"
    shown = uri if redacted(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --backend-store-uri {shown}"


def run_link(experiment: str, run_id: str, ui: str | None = None) -> str:
    """The page of a run in the MLflow UI, without credentials.

    Args:
        ui: where the UI is; None: at the tracking server, or at the usual port if it is a file.
    """
    parts = urllib.parse.urlsplit(ui or tracking_uri())
    base = "http://127.0.0.1:5000"
    if parts.scheme in ("http", "https"):
        base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    page = f"/#/experiments/{experiment}/runs/{run_id}"
    return f"{base}{page}?workflowType=machine_learning"


def experiment_id(pair: str) -> str:
    """The id of experiment ``xsd/<pair>``, made on first use."""
    from mlflow.exceptions import MlflowException

    store = client()
    name = EXPERIMENT_PREFIX + pair
    with lock("experiment"):
        found = store.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        if found is not None:
            store.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        location = None
        if tracking_uri().startswith("sqlite:///"):
            location = (local_root() / pair).as_uri()
        try:
            return str(store.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            line = " ".join(str(error).split())
            raise XsdError(f"cannot make experiment {name!r}: {line}") from error


def experiment_ids() -> list[str]:
    """All experiments: runs are found by their tags, wherever ``mlflow run`` put them."""
    return [str(found.experiment_id) for found in client().search_experiments()]


@lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of the project, with ``-dirty`` appended where it applies; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=project_root(),
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


@lru_cache(maxsize=1)
def environment() -> str:
    """Versions of what a number may depend on: ``python 3.11.7, torch 2.9.0, ...``."""
    names = ("torch", "transformers", "numpy", "numba", "mlflow", "safetensors")
    return ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    )


@lru_cache(maxsize=1)
def user() -> str | None:
    """Who runs this, as ``mlflow run`` would say; None: a user id without a name (a container)."""
    from mlflow.tracking.context.default_context import DefaultRunContext
    from mlflow.utils.mlflow_tags import MLFLOW_USER

    try:
        return str(DefaultRunContext().tags()[MLFLOW_USER])
    except (KeyError, OSError):
        return None


def this_process() -> str:
    """``host:pid:start``: tells whether the process that began a run still lives."""
    import psutil

    me = psutil.Process()
    return f"{socket.gethostname()}:{me.pid}:{me.create_time():.0f}"


def is_gone(process: str) -> bool:
    """Whether a process of this host, as ``this_process`` wrote it, has ended."""
    import psutil

    host, pid, started = process.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 2
    except psutil.NoSuchProcess:
        return True

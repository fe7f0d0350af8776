"""Shapes and types are checked at run time here, one thread is used, and no store is shared."""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from pathlib import Path
from pkgutil import iter_modules

from jaxtyping import install_import_hook

# An int is a float to mypy, so it is one here.
# Not the kernels: they are compiled, and a checked function is not what was written.
_CHECKED = [
    f"xsd.{module.name}"
    for module in iter_modules([str(Path(__file__).parents[1] / "xsd")])
    if module.name != "kernels"
]
install_import_hook(_CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from sqlalchemy import event
from sqlalchemy.engine import Engine

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

torch.set_num_threads(1)
# A busy machine is no failure: nothing here is a timed test.
settings.register_profile("xsd", deadline=None)
settings.load_profile("xsd")


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point MLflow at a database of this test alone; it is made when first used."""
    folder = tmp_path / "store"
    folder.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "XSD_ENV_MANAGER"):
        monkeypatch.delenv(name, raising=False)
    return folder


def _do_not_wait(raw: Any, _: object) -> None:
    if isinstance(raw, sqlite3.Connection):
        raw.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="session")
def _initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised database: making one takes seconds, copying it none."""
    # Waiting for the disk at every commit is what makes a test store slow.
    event.listen(Engine, "connect", _do_not_wait)
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        from xsd.tracking import store

        store.client()
    # What is copied is the database, not its write-ahead log.
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


@pytest.fixture
def tracking(_initialised: Path, own_store: Path) -> Iterator[Path]:
    """A fresh, initialised store; yields its folder, which also holds the artifacts."""
    shutil.copyfile(_initialised, own_store / "mlflow.db")
    yield own_store


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless Chromium, driven by selenium; the test is skipped where there is none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip(
            "there is no Chromium with its driver (apt-get install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()

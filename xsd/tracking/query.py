"""Runs as data frames: what the report, the dashboards and ``xsd lineage`` look at."""

from __future__ import annotations

import fnmatch
import gc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from xsd.errors import XsdError
from xsd.files import read_json
from xsd.tracking import products, store
from xsd.tracking.artifacts import local_folder

if TYPE_CHECKING:
    from mlflow.entities import Run

_COLUMNS = [
    *("run_id", "name", "stage", "level", "pair", "status", "started", "seconds", "parent"),
    *("experiment_id", "tags"),
]


def runs(
    stage: str | None = None,
    pair: str | None = None,
    *,
    parent: str | None = None,
    run_ids: Sequence[str] | None = None,
    only_finished: bool = True,
) -> pd.DataFrame:
    """One row a run, the newest first.

    Columns: run_id, name, stage, level, pair, status, started, seconds, parent, experiment_id, tags
    (a mapping), the metrics under their own names, and the resolved configuration under ``cfg.``.
    """
    if run_ids is not None:
        client = store.client()
        return _frame([client.get_run(run_id) for run_id in run_ids])
    conditions = [
        condition
        for value, condition in (
            (stage, f"tags.stage = '{stage}'"),
            (pair, f"tags.pair = '{pair}'"),
            (parent, f"tags.`mlflow.parentRunId` = '{parent}'"),
            (only_finished, "attributes.status = 'FINISHED'"),
        )
        if value
    ]
    return _frame(_search(" AND ".join(conditions)))


def changed(since: pd.Timestamp, running: Iterable[str]) -> pd.DataFrame:
    """Runs begun at ``since`` or later, and those that were ``running``; as of ``runs``."""
    begun_ms = int(since.timestamp() * 1000)
    client = store.client()
    found = {run.info.run_id: run for run in _search(f"attributes.start_time >= {begun_ms}")}
    found |= {run_id: client.get_run(run_id) for run_id in running if run_id not in found}
    return _frame(list(found.values()))


def history(run_ids: Iterable[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Curves in long form: run_id, metric, step, value."""
    client = store.client()
    rows = [
        (run_id, metric, point.step, point.value)
        for run_id in run_ids
        for metric in metrics
        for point in client.get_metric_history(run_id, metric)
    ]
    return pd.DataFrame(rows, columns=["run_id", "metric", "step", "value"])


def finished_metrics(uri: str) -> dict[str, float] | None:
    """The last value of each metric of a run, ``runs:/<id>``; None: not finished, or gone."""
    from mlflow.exceptions import MlflowException

    try:
        run = store.client().get_run(uri.removeprefix("runs:/"))
    except MlflowException:
        return None
    return dict(run.data.metrics) if run.info.status == "FINISHED" else None


def table(run_id: str, name: str) -> pd.DataFrame:
    """A table that ``Run.table`` kept.

    Raises:
        XsdError: the run has no such table.
    """
    content = read_json(artifact(run_id, f"tables/{name}.json"))
    return pd.DataFrame(content["data"], columns=content["columns"])


def artifact(run_id: str, path: str) -> Path:
    """A file of a run, as a local path; checked against the run's manifest."""
    return products.load(f"runs:/{run_id}/{path}").path


def newest_artifact(run_id: str, pattern: str) -> Path:
    """Of a run's files that match, in its top folder, the last by name; checked like ``artifact``.

    Raises:
        XsdError: the run has no such file.
    """
    listed = [item.path for item in store.client().list_artifacts(run_id)]
    if names := sorted(fnmatch.filter(listed, pattern)):
        return artifact(run_id, names[-1])
    raise XsdError(f"runs:/{run_id}: has no {pattern}")


def num_bytes(found: pd.DataFrame) -> pd.Series[float]:
    """What each run's files weigh; NaN where neither its tags nor a manifest on this disk say."""
    both = zip(found["run_id"], found["tags"], strict=True)
    return pd.Series([_num_bytes(*one) for one in both], index=found.index, dtype=float)


def _num_bytes(run_id: str, tags: Mapping[str, str]) -> float:
    if "xsd.num_bytes" in tags:
        return float(tags["xsd.num_bytes"])
    folder = local_folder(store.client().get_run(run_id).info.artifact_uri)
    manifest = folder / products.MANIFEST if folder else None
    if manifest is None or not manifest.is_file():
        return math.nan
    return float(sum(entry["num_bytes"] for entry in read_json(manifest).values()))


def _search(condition: str) -> list[Run]:
    client, experiments = store.client(), store.experiment_ids()
    found: list[Run] = []
    token: str | None = None
    while True:
        with _no_collection():
            page = client.search_runs(
                experiments, condition, order_by=["attributes.start_time DESC"], page_token=token
            )
        found.extend(page)
        token = page.token
        if not token:
            return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: among a hundred thousand new rows, none of them garbage, it
    takes two thirds of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _frame(found: Sequence[Run]) -> pd.DataFrame:
    rows = []
    for run in found:
        info, tags = run.info, run.data.tags
        seconds = (info.end_time - info.start_time) / 1000 if info.end_time else float("nan")
        rows.append(
            {
                "run_id": info.run_id,
                "name": info.run_name,
                "stage": tags.get("stage", ""),
                "level": tags.get("level", ""),
                "pair": tags.get("pair", ""),
                "status": info.status,
                "started": pd.Timestamp(info.start_time, unit="ms", tz="UTC"),
                "seconds": seconds,
                "parent": tags.get("mlflow.parentRunId", ""),
                "experiment_id": info.experiment_id,
                "tags": tags,
                **run.data.metrics,
                **{key: value for key, value in run.data.params.items() if key.startswith("cfg.")},
            }
        )
    return pd.DataFrame(rows, columns=None if rows else _COLUMNS)

"""Runs as data frames: what the report, the dashboards and ``xsd lineage`` look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from xsd.errors import XsdError
from xsd.files import read_json
from xsd.tracking import products, store

if TYPE_CHECKING:
    from mlflow.entities import Run


def runs(
    stage: str | None = None,
    pair: str | None = None,
    *,
    parent: str | None = None,
    run_ids: Sequence[str] | None = None,
    only_finished: bool = True,
) -> pd.DataFrame:
    """One row a run, the newest first.

    Columns: run_id, name, stage, level, pair, status, started, seconds, parent, the metrics under
    their own names, and the resolved configuration under ``cfg.``.
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


def lineage(uri: str) -> pd.DataFrame:
    """Walk from a product back to its sources.

    Columns: depth, role (what it was to the row above), uri, stage, level, run_id, digest.
    """
    rows: list[dict[str, Any]] = []
    _walk(uri, "", 0, rows)
    return pd.DataFrame(rows)


def _walk(uri: str, role: str, depth: int, rows: list[dict[str, Any]]) -> None:
    try:
        product = products.load(uri)
    except XsdError as error:
        rows.append({"depth": depth, "role": role, "uri": uri, "stage": "", "note": str(error)})
        return
    tags: dict[str, str] = {}
    if product.run_id:
        tags = store.client().get_run(product.run_id).data.tags
    rows.append(
        {
            "depth": depth,
            "role": role,
            "uri": uri,
            "stage": tags.get("stage", ""),
            "level": tags.get("level", ""),
            "run_id": product.run_id or "",
            "digest": product.digest[:12],
            "note": "",
        }
    )
    for name, value in sorted(tags.items()):
        if name.startswith("input."):
            _walk(value, name.removeprefix("input."), depth + 1, rows)


def _search(condition: str) -> list[Run]:
    client = store.client()
    found: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            store.experiment_ids(),
            condition,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        found.extend(page)
        token = page.token
        if not token:
            return found


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
                **run.data.metrics,
                **{key: value for key, value in run.data.params.items() if key.startswith("cfg.")},
            }
        )
    columns = ["run_id", "name", "stage", "level", "pair", "status", "started", "seconds", "parent"]
    return pd.DataFrame(rows, columns=None if rows else columns)

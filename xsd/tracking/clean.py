"""Removing what no stage will ever take up again."""

from __future__ import annotations

import shutil
import time

from xsd.tracking import store
from xsd.tracking.artifacts import local_folder
from xsd.tracking.run import reap


def unfinished(older_than_days: float) -> list[tuple[str, str, str]]:
    """Failed and killed runs, as (id, name, status); dead processes' runs are ended first."""
    client = store.client()
    experiments = store.experiment_ids()
    for experiment in experiments:
        reap(client, experiment)
    before_ms = int((time.time() - older_than_days * 86400) * 1000)
    found = [
        run
        for status in ("FAILED", "KILLED")
        for run in client.search_runs(
            experiments, f"attributes.status = '{status}' AND attributes.end_time < {before_ms}"
        )
    ]
    return [(run.info.run_id, run.info.run_name, run.info.status) for run in found]


def delete(run_id: str) -> None:
    """Delete a run and its local files. Its hard-linked originals elsewhere stay."""
    client = store.client()
    folder = local_folder(client.get_run(run_id).info.artifact_uri)
    client.delete_run(run_id)
    if folder is not None and folder.is_dir():
        shutil.rmtree(folder)

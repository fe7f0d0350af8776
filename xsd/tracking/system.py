"""What a machine does during a long stage, as the ``system/`` charts of MLflow's UI.

MLflow's own monitor takes the samples; its loop is left out, as that would ask the server each time
and wait for one that is away. Here they go the way of all metrics (``spool``).

On for stages that take long and are not timed. MLflow's switch decides where it is set:
``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING``, true for all stages, or false.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from xsd.tracking.open_run import Run

SWITCH: Final = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
INTERVAL: Final = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
_SECONDS: Final = 10.0
_LONG: Final = frozenset({"pretrain", "extract", "train", "sweep"})


@contextmanager
def watched(run: Run) -> Iterator[None]:
    """Sample processor, memory, disk, network and GPUs, from the first interval on."""
    switch = os.environ.get(SWITCH, "").lower()
    if switch in ("false", "0") or (run.stage not in _LONG and switch not in ("true", "1")):
        yield
        return
    ended = threading.Event()
    sampler = threading.Thread(target=_sample, args=(run, ended), name="system", daemon=True)
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()


def _sample(run: Run, ended: threading.Event) -> None:
    seconds = float(os.environ.get(INTERVAL) or _SECONDS)
    if ended.wait(seconds):
        return
    # Only now: most stages of a small pair have ended by then.
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # It would tell every run that there is no GPU.
    logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.WARNING)
    monitor, number = SystemMetricsMonitor(run.run_id), 0
    while True:
        monitor.collect_metrics()
        values = {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
        for source in monitor.monitors:
            source.clear_metrics()
        run.sample(values, number)
        number += 1
        if ended.wait(seconds):
            return

"""How fast the live dashboard opens: 1,000 runs in a store of their own, made and then loaded.

    python -m benchmarks.dashboard [--num_runs 1000] [--store FOLDER]

Prints milliseconds: reading all runs, the overview page, and looking again. Imports are told
truly by a second run with the same store. The mix of runs is that of months of work: half are
trials, a twentieth are benchmarks of 22 configs.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

_STAGES = {"trial": 0.5, "train": 0.15, "evaluate": 0.2, "promote": 0.1, "benchmark": 0.05}
_LEVELS = ("L1", "L2", "L3", "L4", "X1", "L5", "B1", "L5F", "E1", "E2", "E3")


def fill(num_runs: int, seed: int = 0) -> None:
    """Write runs of every stage, with as many metrics and parameters as the real ones have."""
    from mlflow.entities import Metric, Param

    from xsd.decoding.config import ALL_CONFIGS
    from xsd.decoding.strategies import metric_name
    from xsd.plots.overview import CONFIG_METRICS, LEVEL_METRICS
    from xsd.tracking import store

    draw, client, experiment = random.Random(seed), store.client(), store.experiment_id("tiny")
    now_ms = int(time.time() * 1000)
    for number in range(num_runs):
        [stage] = draw.choices(list(_STAGES), list(_STAGES.values()))
        tags = {"stage": stage, "pair": "tiny", "level": draw.choice(_LEVELS), "loss": "token"}
        tags |= {"xsd.key": f"{number:064x}", "xsd.num_bytes": str(draw.randrange(1 << 30))}
        names = [f"val.{index}" for index in range(30)]
        if stage == "benchmark":
            configs = map(metric_name, ALL_CONFIGS)
            names = [f"measured.{config}.{key}" for config in configs for key in CONFIG_METRICS]
        elif stage == "evaluate":
            names = [*LEVEL_METRICS, *names, "accepted_prefix_22", "tau_6"]
        begun_ms = now_ms - (num_runs - number) * 7_000_000
        run = client.create_run(experiment, start_time=begun_ms, tags=tags, run_name=stage)
        params = [Param(f"cfg.{index}", str(index)) for index in range(35)]
        params.append(Param("cfg.configs", "all"))
        metrics = [Metric(name, draw.random(), begun_ms, 0) for name in names]
        client.log_batch(run.info.run_id, metrics=metrics, params=params)
        status = draw.choices(["FINISHED", "FAILED", "KILLED"], [0.94, 0.03, 0.03])[0]
        client.set_terminated(run.info.run_id, status, begun_ms + 60_000)


def measure() -> None:
    """Load what ``fill`` wrote, as a dashboard does when it starts."""
    times: dict[str, float] = {}

    def took(what: str, began: float) -> None:
        times[what] = 1000 * (time.perf_counter() - began)

    began = time.perf_counter()
    from dashboards import views
    from dashboards.archive import Archive, Choice
    from dashboards.parts import Order
    from xsd.tracking import store

    store.client()
    took("imports and connection", began)
    began = time.perf_counter()
    archive = Archive()
    number = len(archive.runs())
    took(f"reading {number} runs", began)
    began = time.perf_counter()
    views.at_a_glance(archive.chosen(Choice()), Order(), None)
    took("overview page", began)
    began = time.perf_counter()
    archive.refresh()
    took("looking again", began)
    for what, ms in times.items():
        print(f"{what:<26}{ms:8.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num_runs", type=int, default=1000)
    parser.add_argument("--store", type=Path, help="kept, and taken as it is if it holds one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.store or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.resolve()}/mlflow.db"
        if not (folder / "mlflow.db").is_file():
            fill(given.num_runs)
        measure()


if __name__ == "__main__":
    main()

"""A small store with everything that the dashboard shows: its runs, and their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.test_plots import COUNTS, EXAMPLE, TRACES, trace
from xsd import bench_report, speedup
from xsd.files import write_json
from xsd.scenes.layout import INDEX_NAME
from xsd.tracking.run import Run, stage_run
from xsd.types import Trace

PIECES = {"5": "a", "6": " car", "7": " on", "8": " a", "9": " road", "2": "."}
CLIP = "rec/000000"


def clip_traces() -> list[Trace]:
    """Two samples by four configs."""
    cycles = {"cycle_drafted": (3,) * 20, "cycle_accepted": (2, 0) * 10}
    found = [*TRACES, trace("drafter+VL", "a", 95.0), trace("E3_decode", "a", 80.0, **cycles)]
    return [replace(one, sample_key=f"{CLIP}/q{'ab'.index(one.sample_key)}") for one in found]


def evaluation(level: str, root: Path, **changes: float) -> str:
    tags = {"level": level, "loss": "token"}
    with stage_run("evaluate", "tiny", {"gamma": 4}, tags=tags) as run:
        folder = root / run.run_id
        write_json(folder / "position_stats.json", {"target": COUNTS.target.positions()})
        run.artifacts(folder)
        rates = {**COUNTS.rates(), "modelled.speedup_e2e": 1.3, "num_parameters": 1e5}
        run.log({**rates, "accept_length": 2.0, **changes})
    return run.run_id


def dataset(root: Path) -> str:
    """Scenes of one clip, as the stage keeps them."""
    folder = root / "scenes"
    images = []
    for number in range(2):
        path = folder / f"event_image/rec/000000_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 90 * number, np.uint8)).save(path)
        images.append(f"event_image/rec/000000_{number}.png")
    frames = folder / "video/rec/000000"
    frames.mkdir(parents=True)
    for number in range(9):
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(
            frames / f"{number:03d}.png"
        )
    entry = {
        "id": "rec/000000",
        "split": "test",
        "event_data": "event_npy/rec/000000.npy",
        "event_image": images,
        "video_data": "video/rec/000000",
    }
    write_json(folder / INDEX_NAME, [entry])
    with stage_run("scenes", "tiny", {}) as run:
        run.artifacts(folder, "scenes")
    return run.uri


def benchmark(root: Path, scenes: str, pair: str = "tiny") -> str:
    traces = clip_traces()
    configs = ",".join(
        dict.fromkeys(one.strategy for one in traces if one.strategy != "vl_baseline")
    )
    config: Mapping[str, object] = {"configs": configs, "control": "null"}
    with stage_run("benchmark", pair, config, tags={"input.dataset_dir": scenes}) as run:
        summary = speedup.measured(traces)
        stored = {
            "summary": json.loads(summary.to_json(orient="records")),
            "media_ms_mean": 3.2,
            "traces": [asdict(one) for one in traces],
            "pieces": PIECES,
        }
        write_json(root / run.run_id / "e2e_wallclock_20260101_000000.json", stored)
        write_json(root / run.run_id / "example.json", EXAMPLE.as_dict())
        run.artifacts(root / run.run_id)
        run.log(bench_report.metrics(summary))
        run.tag({"num_failures": 1})
    return run.run_id


def search(parent: Run) -> None:
    trials = pd.DataFrame(
        {
            "number": [0, 1, 2],
            "state": ["complete", "pruned", "complete"],
            "accept_length": [1.0, 0.5, 2.0],
            "latency_ms": [0.1, 0.2, 0.3],
            "num_epochs": [2, 1, 2],
            "seconds": [1.0, 0.5, 1.0],
            "on_front": [True, False, True],
            "run": [f"runs:/{digit * 32}" for digit in "abc"],
            "reason": "",
            "learning_rate": [1e-3, 1e-2, 1e-4],
            "loss": ["token", "feature", "token"],
        }
    )
    shares = {"objective": "accept_length", "parameter": ["learning_rate"], "importance": [1.0]}
    parent.table("trials", trials)
    parent.table("importance", pd.DataFrame(shares))


def fill(root: Path) -> dict[str, str]:
    """Run ids by what they are: evaluations and more of pair tiny, a benchmark of another."""
    made = {name: evaluation(name, root, accept_length=n) for n, name in enumerate(("L4", "E3"), 1)}
    made["E1"] = evaluation("E1", root, accept_length=1.5, accept_90=0.01)
    with stage_run("train", "tiny", {}, tags={"level": "L4", "loss": "token"}) as run:
        for step in (1, 2):
            run.log({"val.accept_length": step / 2}, step=step)
    made["train"] = run.run_id
    scenes = dataset(root)
    made["scenes"] = scenes.removeprefix("runs:/")
    made["benchmark"] = benchmark(root, scenes)
    made["other"] = benchmark(root, "/nowhere", pair="other")
    with stage_run("sweep", "tiny", {}, tags={"level": "L4"}) as run:
        search(run)
    made["sweep"] = run.run_id
    with pytest.raises(RuntimeError), stage_run("train", "tiny", {}, tags={"level": "L1"}) as run:
        raise RuntimeError("the disk is full")
    made["failed"] = run.run_id
    return made


@pytest.fixture(scope="session")
def shelf(
    _initialised: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """Address of a filled store, and its run ids; made once, so nobody writes to it."""
    root = tmp_path_factory.mktemp("shelf")
    shutil.copyfile(_initialised, root / "mlflow.db")
    uri = f"sqlite:///{root}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        return uri, fill(root)


@pytest.fixture
def filled(shelf: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The filled store, to be read."""
    uri, made = shelf
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return made


@pytest.fixture
def own(tracking: Path, tmp_path: Path) -> dict[str, str]:
    """A store of one's own, to be changed: a single evaluation."""
    return {"E3": evaluation("E3", tmp_path)}

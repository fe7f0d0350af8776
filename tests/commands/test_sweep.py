from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.commands.conftest import World, drawn, tags, xsd
from xsd.adapters import checkpoint
from xsd.commands import sweep
from xsd.config import parse
from xsd.tracking import products, query, store

SPACE = """
learning_rate: {type: float, low: 1.0e-3, high: 1.0e-2, log: true}
ffn_dim: {type: categorical, choices: [8, 16]}
"""


@pytest.fixture
def words(world: World, workplace: Path) -> list[Any]:
    (workplace / "space.yaml").write_text(SPACE)
    return ["sweep", *world.train_flags, "--level", "L4", "--space", "space.yaml"]


def children(run: Any) -> list[Any]:
    condition = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    return list(store.client().search_runs(store.experiment_ids(), condition))


def test_a_child_a_trial_and_the_best_is_a_candidate(
    words: list[Any], runs: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    xsd(*words, "--num_trials", 3, "--pruner", "none")
    [parent] = runs("sweep")
    trials = sorted(children(parent), key=lambda run: int(run.data.tags["trial"]))
    assert [run.info.run_name for run in trials] == ["trial 0", "trial 1", "trial 2"]
    assert {run.info.status for run in trials} == {"FINISHED"}
    values = [run.data.metrics["val.accepted_prefix_22"] for run in trials]
    assert len({run.data.params["cfg.learning_rate"] for run in trials}) == 3
    table = query.table(parent.info.run_id, "trials")
    assert table["accept_length"].tolist() == pytest.approx(
        [max(point.value for point in _curve(run)) for run in trials], abs=1e-6
    )
    assert table["run"].tolist() == [f"runs:/{run.info.run_id}" for run in trials]
    best = int(tags(parent)["best_trial"])
    assert table["accept_length"][best] == table["accept_length"].max() >= max(values) - 1e-6
    assert tags(parent)["best_run"] == table["run"][best]
    [given] = parent.inputs.dataset_inputs
    assert given.dataset.name == "chunked_train_1s_fp32"
    kept = products.load(f"runs:/{parent.info.run_id}")
    _, about = checkpoint.load(products.load(f"models:/{kept.model_id}").path, expect_level="L4")
    assert about["extra"]["training"]["learning_rate"] == pytest.approx(
        float(trials[best].data.params["cfg.learning_rate"])
    )
    names = drawn(kept.path / "figures" / "sweep.html")
    assert names == ["history", "parallel_coordinates"], "three trials explain no importance"
    assert "3 trials (3 complete)" in tags(parent)["mlflow.note.content"]
    [folder] = Path("outputs/sweep").iterdir()
    assert not list(folder.glob("trial_*")), "runs keep the checkpoints"
    assert (folder / "study.log").is_file()
    assert f"by trial {best}: learning_rate=" in capsys.readouterr().out


def _curve(run: Any) -> list[Any]:
    return list(store.client().get_metric_history(run.info.run_id, "val.accepted_prefix_22"))


def test_more_trials_go_on_with_the_study(words: list[Any], runs: Callable[..., list[Any]]) -> None:
    xsd(*words, "--num_trials", 2)
    xsd(*words, "--num_trials", 2)  # the same question: reused
    [first] = runs("sweep")
    xsd(*words, "--num_trials", 3)
    second = next(run for run in runs("sweep") if run.info.run_id != first.info.run_id)
    assert [run.data.tags["trial"] for run in children(second)] == ["2"]
    assert tags(second)["resumes"] == f"runs:/{first.info.run_id}"


@pytest.mark.slow
def test_two_objectives_in_two_processes(words: list[Any], runs: Callable[..., list[Any]]) -> None:
    both = ["--objectives", "accept_length,latency_ms"]
    xsd(*words, "--n_trials", 5, "--num_workers", 2, "--storage", "shared.log", *both)
    [parent] = runs("sweep")
    table = query.table(parent.info.run_id, "trials")
    assert table["number"].tolist() == [0, 1, 2, 3, 4]
    assert set(table["state"]) == {"complete"}
    trials = {f"runs:/{run.info.run_id}": run for run in children(parent)}
    assert set(trials) == set(table["run"])
    latencies = [trials[uri].data.metrics["measured.latency_ms"] for uri in table["run"]]
    assert table["latency_ms"].tolist() == pytest.approx(latencies, abs=1e-6)
    processes = {tags(run)["xsd.process"] for run in trials.values()}
    # A fast worker may leave the other nothing.
    assert 1 <= len(processes) <= 2 and tags(parent)["xsd.process"] not in processes
    best = table.set_index("run").loc[tags(parent)["best_run"]]
    assert best["on_front"] and best["accept_length"] == table["accept_length"].max()
    kept = products.load(f"runs:/{parent.info.run_id}")
    assert {"pareto", "history"} <= {*drawn(kept.path / "figures" / "sweep.html")}
    assert Path("shared.log").is_file() and not list(Path("outputs").rglob("study.log"))


def test_conditioning_can_be_searched(
    words: list[Any], world: World, runs: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs of the other conditioning are looked for, or made, as an input of their own."""
    asked: list[str] = []

    def find(config: Any, half: str, conditioning: str) -> dict[str, products.Product]:
        asked.append(conditioning)
        return {"data": products.from_path(world.data), "lm_head": products.from_path(world.head)}

    monkeypatch.setattr("xsd.commands.sweep.find_inputs", find)
    choices = "conditioning: {type: categorical, choices: [free_running, teacher_forced]}"
    Path("space.yaml").write_text(choices)
    xsd(*words, "--num_trials", 2, "--num_epochs", 1)
    assert asked == ["teacher_forced", "free_running"]
    [parent] = runs("sweep")
    assert tags(parent)["input.data.free_running"] == str(world.data)


NOTING = """
import sys
from xsd.cli import main
from xsd.learning.batches import TrainBatches

plain = TrainBatches.__call__

def noting(self, epoch, done=0):
    for batch in plain(self, epoch, done):
        with open(sys.argv[1], "ab") as file:
            file.write(b".")
        yield batch

TrainBatches.__call__ = noting
if __name__ == "__main__":
    raise SystemExit(main(sys.argv[2:]))
"""
"""``xsd``, which notes every batch that it begins to train on."""
NUM_KILLS = 5


@pytest.mark.slow
def test_killed_at_random_moments_it_gives_what_an_unbroken_one_does(
    words: list[Any], runs: Callable[..., list[Any]]
) -> None:
    """And no more than the batch in hand is trained on again."""
    Path("noting.py").write_text(NOTING)
    options = ["--num_trials", 4, "--num_epochs", 25, "--early_stopping", 0, "--pruner", "none"]
    draw = random.Random(0)

    def begun(note: str) -> int:
        return Path(note).stat().st_size if Path(note).exists() else 0

    def sweep(note: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "noting.py", note, *words, *options, "--output_dir", note + "s"]
        search_path = {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(list(map(str, command)), env=os.environ | search_path)

    for _ in range(NUM_KILLS):
        target = begun("killed") + draw.randrange(1, 40)
        child = sweep("killed")
        while begun("killed") < target:
            assert child.poll() is None, "it was over before it could be killed"
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.02))
        child.kill()
        child.wait()
    assert sweep("killed").wait() == 0
    assert len(runs("sweep")) == 1
    words.append("--rerun")
    assert sweep("whole").wait() == 0
    whole, killed = sorted(runs("sweep"), key=lambda run: -run.info.start_time)
    tables = [query.table(run.info.run_id, "trials") for run in (whole, killed)]
    same = ["number", "state", "accept_length", "num_epochs", "learning_rate", "ffn_dim"]
    assert tables[0][same].to_dict("records") == tables[1][same].to_dict("records")
    assert set(tables[0]["state"]) == {"complete"} and len(tables[0]) == 4
    assert begun("whole") < begun("killed") <= begun("whole") + NUM_KILLS
    condition = "tags.stage = 'trial' AND attributes.status = 'KILLED'"
    dead = store.client().search_runs(store.experiment_ids(), condition)
    assert dead and not {f"runs:/{run.info.run_id}" for run in dead} & {*tables[1]["run"]}
    for uri in tables[1]["run"]:
        # Whoever trained which epoch.
        curve = _curve(store.client().get_run(uri.removeprefix("runs:/")))
        assert len(curve) == 25


def test_a_trial_whose_run_ended_is_told_not_trained_again(
    words: list[Any], runs: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the end of its run and the study's being told."""

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", stopped)
        with pytest.raises(KeyboardInterrupt):
            flags = [str(word) for word in (*words[1:], "--num_trials", 1)]
            sweep.run(parse(sweep.Config, flags, prog="xsd sweep"))
    condition = "tags.stage = 'trial' AND attributes.status = 'FINISHED'"
    [ended] = store.client().search_runs(store.experiment_ids(), condition)
    xsd(*words, "--num_trials", 1)
    assert len(store.client().search_runs(store.experiment_ids(), condition)) == 1
    [parent] = [run for run in runs("sweep") if run.info.status == "FINISHED"]
    [trial] = query.table(parent.info.run_id, "trials").to_dict("records")
    assert (trial["state"], trial["run"]) == ("complete", f"runs:/{ended.info.run_id}")
    best = max(point.value for point in _curve(ended))
    assert trial["accept_length"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [("level: {type: categorical, choices: [L1]}", "level"), ("seed: 3", "seed"), (None, "space")],
)
def test_bad_space(
    words: list[Any], text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("space.yaml")
    path.unlink() if text is None else path.write_text(text)
    xsd(*words, expect=2)
    assert message in capsys.readouterr().err


def test_the_space_is_that_of_the_levels_family(
    world: World, workplace: Path, monkeypatch: pytest.MonkeyPatch, runs: Callable[..., list[Any]]
) -> None:
    root = Path(__file__).parents[2]
    (workplace / "MLproject").write_text("name: here\n")
    (workplace / "experiments").symlink_to(root / "experiments")
    small = ["--num_trials", 1, "--num_epochs", 1]
    xsd("sweep", *world.train_flags, "--level", "L1", *small)
    [parent] = runs("sweep")
    assert tags(parent)["input.space"].endswith("sweep_bottleneck.yaml")

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import World, tags, xsd
from xsd.adapters import checkpoint
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
    assert table["value"].tolist() == pytest.approx(
        [max(point.value for point in _curve(run)) for run in trials], abs=1e-6
    )
    best = int(tags(parent)["best_trial"])
    assert table["value"][best] == table["value"].max() >= max(values) - 1e-6
    kept = products.load(f"runs:/{parent.info.run_id}")
    _, about = checkpoint.load(products.load(f"models:/{kept.model_id}").path, expect_level="L4")
    assert about["extra"]["training"]["learning_rate"] == pytest.approx(
        float(trials[best].data.params["cfg.learning_rate"])
    )
    [folder] = Path("outputs/sweep").iterdir() if Path("outputs/sweep").is_dir() else [None]
    assert folder is not None
    assert [path.name for path in folder.glob("trial_*")] == [f"trial_{best:03d}"]
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


def test_every_level_has_a_space(
    world: World, workplace: Path, monkeypatch: pytest.MonkeyPatch, runs: Callable[..., list[Any]]
) -> None:
    root = Path(__file__).parents[2]
    (workplace / "MLproject").write_text("name: here\n")
    (workplace / "experiments").symlink_to(root / "experiments")
    small = ["--num_trials", 1, "--num_epochs", 1]
    xsd("sweep", *world.train_flags, "--level", "L1", *small)
    [parent] = runs("sweep")
    assert tags(parent)["input.space"].endswith("sweep.yaml")

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import World, tags, xsd
from tests.hidden.test_store import seed_folder
from xsd.adapters import checkpoint
from xsd.adapters.catalog import level
from xsd.commands import train
from xsd.learning import fit as fit_module
from xsd.tracking import products, store
from xsd.types import EpochReport


def only_folder(name: str) -> Path:
    [folder] = Path("outputs/train", name).iterdir()
    return folder


@pytest.mark.parametrize("name", ["L1", "L4", "L5F", "E2", "E3", "X1"])
def test_what_a_training_leaves(world: World, runs: Callable[..., list[Any]], name: str) -> None:
    xsd("train", *world.train_flags, "--level", name)
    folder, row = only_folder(name), level(name)
    assert folder.name.startswith(f"{name}_2")
    found = {path.name for path in folder.iterdir()}
    expected = {"best_model.safetensors", "final_model.safetensors", "config.json", "history.json"}
    assert found == {*expected, "train.html"}
    history = json.loads((folder / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [0, 1]
    assert {"accept_90", "token_top1_match", "loss", row.selection_metric} <= set(history[0]["val"])
    [run] = runs("train")
    assert run.info.run_name == f"train {name}"
    kept = products.load(f"runs:/{run.info.run_id}")
    for path in (folder, kept.path, products.load(f"models:/{kept.model_id}").path):
        _, about = checkpoint.load(path, expect_level=name, expect_widths=(24, 32))
        assert about["extra"]["conditioning"] == "teacher_forced"
    best = max(entry["val"][row.selection_metric] for entry in history)
    model = store.client().get_logged_model(kept.model_id)
    metrics = {metric.key: metric.value for metric in model.metrics}
    assert metrics["val.accept_length"] == pytest.approx(best)
    assert model.tags["level"] == name and model.tags["deployable"] == "true"
    assert "selected_on_test" not in model.tags and "approximate_split" not in model.tags
    assert run.data.params["cfg.num_epochs"] == "2" and tags(run)["input.data"] == str(world.data)
    curve = store.client().get_metric_history(run.info.run_id, "val.accept_length")
    assert len(curve) >= 2


def test_variants_of_a_level_are_told_apart_by_name(
    world: World, runs: Callable[..., list[Any]]
) -> None:
    for loss in ("token", "feature"):
        xsd("train", *world.train_flags, "--level", "L4", "--num_epochs", "1", "--loss", loss)
    ids = [products.load(f"runs:/{run.info.run_id}").model_id for run in runs("train")]
    models = [store.client().get_logged_model(str(model_id)) for model_id in ids]
    assert {model.name for model in models} == {"L4", "L4-feature"}
    assert {model.tags["level"] for model in models} == {"L4"}
    assert train.model_title({"level": "L4", "conditioning": "free_running"}) == "L4-free"


def test_the_same_training_is_reused_and_another_seed_is_not(
    world: World, runs: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *world.train_flags]
    for more in ([], [], ["--seed", "1"], ["--rerun"]):
        xsd(*words, *more)
    assert capsys.readouterr().out.count("reused run") == 1
    first, other, again = (
        checkpoint.load(products.load(f"runs:/{run.info.run_id}").path)[1]["sha256"]
        for run in sorted(runs("train"), key=lambda run: run.info.start_time)
    )
    assert first == again != other


class Killed(BaseException):
    pass


def test_an_interrupted_training_ends_with_the_same_weights(
    world: World, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", *world.train_flags, "--level", "L4", "--num_epochs", "4"]
    original = fit_module.fit

    def dying(*args: Any, **kwargs: Any) -> Iterator[EpochReport]:
        for report in original(*args, **kwargs):
            yield report
            if report.epoch == 1:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "fit", dying)
        with pytest.raises(Killed):
            xsd(*words)
    killed = only_folder("L4")
    assert list((killed / ".unfinished").glob("state*"))
    xsd(*words)
    assert only_folder("L4") == killed and not (killed / ".unfinished").exists()
    history = json.loads((killed / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [0, 1, 2, 3]
    xsd(*words, "--rerun")
    [whole] = set(Path("outputs/train/L4").iterdir()) - {killed}
    sums = [checkpoint.load(folder)[1]["sha256"] for folder in (killed, whole)]
    assert sums[0] == sums[1]


def test_resume_false_begins_anew(
    world: World, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train, "_keep", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            xsd("train", *world.train_flags)
    first = only_folder("L1")
    xsd("train", *world.train_flags, "--resume", "false")
    assert len(list(Path("outputs/train/L1").iterdir())) == 2 and (first / ".unfinished").exists()


def test_test_data_may_validate_but_bars_promotion(
    world: World, runs: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    xsd("train", *world.train_flags, "--val_data", world.data / "chunked_test_1s_fp32")
    assert "is test data: weights chosen on it cannot be promoted" in capsys.readouterr().err
    [run] = runs("train")
    assert tags(run)["selected_on_test"] == "true"
    model = store.client().get_logged_model(tags(run)["xsd.model_id"])
    assert model.tags["selected_on_test"] == "true"


def test_published_chunks(
    world: World,
    workplace: Path,
    runs: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = seed_folder(workplace / "chunked_train_1s_4bit", width=32)
    words = ["train", *world.train_flags, "--train_data", folder]
    xsd(*words, "--adapter_level", "5", "--vlm_only")
    [run] = runs("train")
    assert tags(run)["level"] == "B1" and tags(run)["approximate_split"] == "true"
    assert tags(run)["conditioning"] == "free_running"
    for name in ("X1", "E1", "E2", "E3", "text"):
        xsd(*words, "--level", name, expect=2)
        assert f"level {name} reads" in capsys.readouterr().err
    xsd(*words, "--val_data", folder, expect=2)
    assert "--val_data is the training data itself" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(
    world: World, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *world.train_flags]
    xsd(*words, "--data", seed_folder(workplace / "chunked_train_1s_4bit"), expect=2)
    assert "LM head of width 32 for states of width 3" in capsys.readouterr().err
    xsd(*words, "--data", "nowhere", expect=2)
    assert "nowhere: no such file or folder" in capsys.readouterr().err
    xsd(*words, "--data", world.data / "chunked_test_1s_fp32", expect=2)
    assert "its val split is empty" in capsys.readouterr().err
    xsd(*words, "--level", "L9", expect=2)
    assert "unknown level 'L9'" in capsys.readouterr().err
    xsd(*words, "--attention", "bidirectional", "--level", "L5", expect=2)
    assert "only L4 has" in capsys.readouterr().err
    xsd(*words, "--device", "cuda:7", expect=2)
    assert "--device cuda:7: this machine has" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_leaves_no_product(
    world: World, runs: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    xsd("train", *world.train_flags, "--learning_rate", "1e30", "--max_norm", "1e30", expect=2)
    assert "the loss became" in capsys.readouterr().err
    assert not runs("train")


def test_a_fresh_checkout_makes_what_it_lacks(
    world: World, runs: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenes, extraction and LM head; only the rendering is replaced by clips that are there."""
    from xsd.commands import scenes

    monkeypatch.setattr(scenes, "perform", lambda _: products.from_path(world.scenes))
    words = [*world.train_flags]
    for name in ("--data", "--lm_head"):
        at = words.index(name)
        del words[at : at + 2]
    xsd("train", *words)
    [run] = runs("train")
    assert len(runs("extract")) == len(runs("lm_head")) == 1
    assert tags(run)["input.data"] == f"runs:/{runs('extract')[0].info.run_id}"
    xsd("train", *words, "--level", "E3")
    assert len(runs("extract")) == 1


def test_what_is_lacking_is_made_by_the_recipe(
    world: World,
    runs: Callable[..., list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of every stage before: its own section, and its level's."""
    from xsd.commands import scenes

    monkeypatch.setattr(scenes, "perform", lambda _: products.from_path(world.scenes))
    recipe = tmp_path / "recipe.yaml"
    small = "{num_heads: 2, ffn_dim: 16, num_epochs: 1, batch_size: 4}"
    recipe.write_text(
        f"extract: {{max_new_tokens: 5}}\ntrain: {small}\ntrain.L4: {{dropout: 0.25}}\n"
    )
    words = [*world.pair_flags, "--config", str(recipe)]
    xsd("evaluate", *words, "--level", "L4")
    [extract, train] = [runs(stage)[0].data.params for stage in ("extract", "train")]
    assert extract["cfg.max_new_tokens"] == "5"
    assert (train["cfg.dropout"], train["cfg.num_epochs"]) == ("0.25", "1")

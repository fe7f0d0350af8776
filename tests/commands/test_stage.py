"""Inputs, keys and reuse: what every stage does around its own work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from xsd.commands import stage
from xsd.errors import XsdError
from xsd.files import write_text
from xsd.tracking import products, query, store
from xsd.tracking.products import Product
from xsd.tracking.run import Run


@dataclass(frozen=True)
class Config(stage.StageConfig):
    pair: str = "tiny"
    size: int = 3


def perform(config: Config, calls: list[int], folder: Path, fails: bool = False) -> Product:
    def work(run: Run, inputs: Mapping[str, Product]) -> None:
        calls.append(config.size)
        if fails:
            raise XsdError("the work went wrong")
        path = folder / "product.txt"
        write_text(path, str(config.size))
        run.artifact(path)

    return stage.perform("scenes", config, resolve=dict, rooms=["scenes"], work=work)


@pytest.mark.usefixtures("tracking")
def test_the_same_work_is_done_once(tmp_path: Path) -> None:
    calls: list[int] = []
    first = perform(Config(), calls, tmp_path)
    again = perform(Config(), calls, tmp_path)
    assert calls == [3] and again.run_id == first.run_id
    assert (again.path / "product.txt").read_text() == "3"
    other = perform(Config(size=4), calls, tmp_path)
    assert calls == [3, 4] and other.run_id != first.run_id
    forced = perform(Config(rerun=True), calls, tmp_path)
    assert calls == [3, 4, 3] and forced.run_id != first.run_id


@pytest.mark.usefixtures("tracking")
def test_a_run_that_reused_another_stands_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``mlflow run`` begins a run before anybody knows that the work is done already."""
    first = perform(Config(), [], tmp_path)
    begun = store.client().create_run(store.experiment_id("tiny")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    perform(Config(), [], tmp_path)
    assert products.load(f"runs:/{begun}") == products.load(first.uri)
    assert products.load(f"runs:/{begun}/product.txt").path == first.path / "product.txt"


@pytest.mark.usefixtures("tracking")
def test_damaged_and_failed_work_is_not_reused(tmp_path: Path) -> None:
    calls: list[int] = []
    with pytest.raises(XsdError, match="went wrong"):
        perform(Config(), calls, tmp_path, fails=True)
    product = perform(Config(), calls, tmp_path)
    assert calls == [3, 3]
    (product.path / "product.txt").unlink()
    (product.path / "product.txt").write_text("altered")
    perform(Config(), calls, tmp_path)
    assert calls == [3, 3, 3]
    statuses = sorted(query.runs("scenes", only_finished=False)["status"])
    assert statuses == ["FAILED", "FINISHED", "FINISHED"]


@pytest.mark.usefixtures("tracking")
def test_an_input_is_the_one_given_or_the_newest(tmp_path: Path) -> None:
    calls: list[int] = []
    first = perform(Config(size=1), calls, tmp_path)
    second = perform(Config(size=2), calls, tmp_path)
    assert stage.upstream("scenes", None, Config()).run_id == second.run_id
    assert stage.upstream("scenes", first.uri, Config()).run_id == first.run_id
    assert stage.upstream("scenes", str(tmp_path), Config()).path == tmp_path
    with pytest.raises(XsdError, match="no such"):
        stage.upstream("scenes", str(tmp_path / "missing"), Config())

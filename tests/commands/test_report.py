from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import World, xsd
from tests.dashboards.test_report import Page
from xsd.tracking import products


@pytest.fixture
def finished(world: World, workplace: Path, runs: Callable[..., list[Any]]) -> list[str]:
    """Run ids of a training and its evaluation."""
    xsd("train", *world.train_flags, "--level", "L4")
    [train] = runs("train")
    given = ["--checkpoint", f"runs:/{train.info.run_id}", "--data", world.data]
    xsd("evaluate", *world.pair_flags, *given, "--lm_head", world.head)
    [evaluate] = runs("evaluate")
    return [evaluate.info.run_id, train.info.run_id]


def test_by_run_ids_and_by_newest(
    world: World, finished: list[str], runs: Callable[..., list[Any]]
) -> None:
    xsd("report", "--pair", world.pair.pair, "--runs", ",".join(finished))
    written = Path("outputs/report/report.html").read_text()
    found = Page(written)
    assert found.headings[1:] == ["Levels, offline"]
    [row] = [row for row in found.rows if row and row[0] == "L4"]
    assert row[1] == "drafter"
    assert all(run_id[:8] in written for run_id in finished)
    [run] = runs("report")
    kept = products.load(f"runs:/{run.info.run_id}").path / "report.html"
    assert kept.read_text() == written
    xsd("report", "--pair", world.pair.pair, "--output_dir", "newest", "--rerun")
    rows = [row for row in Page(Path("newest/report.html").read_text()).rows if row]
    assert row in rows


def test_nothing_to_report(
    world: World, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xsd("report", "--pair", world.pair.pair, expect=2)
    assert "no finished runs" in capsys.readouterr().err
    xsd("report", "--pair", world.pair.pair, "--runs", "deadbeef", expect=2)
    assert "no such run" in capsys.readouterr().err

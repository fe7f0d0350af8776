"""The scenes stage on what users have: raw recordings, footage, a prepared folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import xsd
from tests.hidden import miniature
from tests.scenes.test_footage import write_film
from tests.scenes.test_raw_dsec import write_raw
from xsd.commands.extract import dataset_folder
from xsd.scenes.dsec import load_index
from xsd.tracking import products


def made(runs: Callable[..., list[Any]]) -> Path:
    return dataset_folder(products.load(f"runs:/{runs('scenes')[0].info.run_id}"))


@pytest.mark.parametrize("source", ["dsec", "video"])
def test_cut_scenes_are_kept_and_found_again(
    source: str, workplace: Path, runs: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    given = workplace / "given"
    if source == "dsec":
        write_raw(given)
    else:
        write_film(given / "a.mp4")
    words = ["scenes", "--source", source, "--dataset_dir", given, "--num_workers", 1]
    xsd(*words)
    (run,) = runs("scenes")
    scenes = load_index(made(runs))
    assert len(scenes) == sum(run.data.metrics.values()) and scenes[0].video.is_file()
    xsd(*words)
    assert "reused run" in capsys.readouterr().out
    # What it is taken from has changed: a new run.
    (given / "a.mp4").unlink() if source == "video" else None
    write_raw(given, "thun_00_a") if source == "dsec" else write_film(given / "b.mp4", seconds=1.2)
    xsd(*words)
    assert len(runs("scenes")) == 2


def test_a_prepared_folder_is_pointed_to(workplace: Path, runs: Callable[..., list[Any]]) -> None:
    data = miniature.save_scenes(workplace / "elsewhere")
    xsd("scenes", "--source", "prepared", "--dataset_dir", data)
    assert made(runs) == data


def test_no_such_source(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in ("prepared", "dsec", "video"):
        xsd("scenes", "--source", source, "--dataset_dir", "nowhere", expect=2)
        assert f"source '{source}' needs dataset_dir" in capsys.readouterr().err
        xsd("scenes", "--source", source, expect=2)
        assert capsys.readouterr().err.endswith("; got none\n")

"""Servers, stores and disks that refuse, search spaces and runs that are none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tests.commands.bad_input.conftest import Refused, extract, train
from tests.commands.conftest import World
from xsd.tracking import store


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(listening.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for connection in accepted:
            connection.close()


def test_a_tracking_server_that_does_not_answer(
    refused: Refused, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PROBE_SECONDS", 0.2)
    for uri in ("http://127.0.0.1:9", "http://no.such.host.invalid", silent_server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for words in (["scenes", "--num_train", 1], ["registry"], ["report"]):
            line = refused(*words)
            assert f"tracking server {uri} does not answer" in line and "start it" in line


def test_a_store_that_is_none(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("junk.db").write_bytes(b"no database at all" * 100)
    for uri in ("sqlite:///junk.db", "gopher://x"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert f"tracking store {uri}: " in refused("registry")


def test_a_place_that_cannot_be_written(
    world: World, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a_file").write_text("here first")
    for words in (
        train(world, world.data, "--output_dir", "a_file"),
        extract(world, world.scenes, "--output_dir", "a_file"),
        ["scenes", "--num_train", 1, "--output_dir", "a_file"],
        ["lm_head", *world.pair_flags, "--output_path", "a_file/head.safetensors"],
    ):
        assert "a_file" in refused(*words)

    # Before anything is measured, and where the system says that there is no such place.
    bench = ["--configs", "oracle", "--max_samples", 1, "--dataset_dir", world.scenes]
    with monkeypatch.context() as patch:
        patch.setattr("xsd.pairs.catalog.load_pair", lambda _: pytest.fail("it has begun"))
        for place in ("a_file", "/proc/x"):
            words = ["benchmark", *world.pair_flags, *bench, "--output_dir", place]
            line = refused(*words)
            assert f"error: {place}/" in line and "cannot be made (" in line
    for words in (
        train(world, world.data, "--output_dir", "/proc/x"),
        ["scenes", "--num_train", 1, "--output_dir", "/proc/x"],
    ):
        assert "cannot be made (No such file or directory)" in refused(*words)

    def full(*_: object, **__: object) -> None:
        # The library's own words: it has no errno.
        raise SafetensorError("Error while serializing: I/O error: no space (os error 28)")

    # In the process itself, and in the thread that makes chunks.
    for module in ("parts", "chunk"):
        with monkeypatch.context() as patch:
            patch.setattr(f"xsd.hidden.{module}.save_file", full)
            line = refused(*extract(world, world.scenes))
            assert ".safetensors: No space left on device; choose another place" in line


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("[]", "a search space maps names to ranges"),
        ("level: {type: categorical, choices: [L1]}", "'level' cannot be searched"),
        ("dropout: 3", "dropout: 'type' must be one of float, int, categorical"),
        ("dropout: {type: float, low: 1, high: 0}", "dropout: "),
        ("dropout: {type: float, low: a, high: b}", "dropout: "),
        ("num_heads: {type: categorical, choices: [7]}", "no trial was completed"),
    ],
)
def test_a_search_space_that_is_none(
    world: World, refused: Refused, space: str, message: str
) -> None:
    Path("space.yaml").write_text(space)
    search = ["--num_trials", 2, "--space", "space.yaml", "--level", "L4"]
    words = ["sweep", *world.train_flags, "--num_epochs", 1, *search]
    assert message in refused(*words, "--output_dir", ".study")


def test_runs_that_are_not_there(refused: Refused) -> None:
    assert "runs:/nope: no such run" in refused("promote", "--candidate", "runs:/nope")
    assert "models:/tiny-L1@champion: no such model" in refused(
        "evaluate", "--checkpoint", "models:/tiny-L1@champion"
    )
    assert "no finished benchmark" in refused("lineage")
    assert "no finished runs" in refused("report")
    assert "runs:/nope: no such run" in refused("report", "--runs", "nope")

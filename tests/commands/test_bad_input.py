"""Every kind of bad input, from the shell's side: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands.conftest import World, xsd
from xsd.cli import COMMANDS, main
from xsd.errors import XsdError
from xsd.files import write_json
from xsd.hidden.store import HiddenStore
from xsd.pairs.config import PairConfig
from xsd.scenes.layout import INDEX_NAME
from xsd.tracking import store

Refused = Callable[..., str]
Damage = Callable[[Path], None]


@pytest.fixture
def refused(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must refuse; returns its one line.

    Progress that was shown before does not count. What stands in the folder afterwards stood there
    before, or is hidden, or is an index that says of itself that it is unfinished.
    """

    def run(*words: object) -> str:
        before = set(_visible(workplace))
        capfd.readouterr()
        code = main([str(word) for word in words])
        shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in shown if "error" in line.lower()]
        assert code == 2, shown
        assert len(lines) == 1 and "Traceback" not in "\n".join(shown), shown
        assert lines[0].startswith(f"xsd {words[0]}: error: ")
        left = [path for path in _visible(workplace) if path not in before]
        assert all(_is_unfinished(path) for path in left), left
        return lines[0]

    return run


def _visible(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return [p for p in found if not any(part.startswith(".") for part in p.parts)]


def _is_unfinished(path: Path) -> bool:
    return path.name == "index.json" and json.loads(path.read_text())["complete"] is False


@pytest.fixture
def scenes(world: World, workplace: Path) -> Path:
    """A copy of the scenes, to be damaged, whose event images have to be rendered."""
    shutil.copytree(world.scenes, "scenes")
    shutil.rmtree("scenes/event_image")
    return Path("scenes")


@pytest.fixture
def data(world: World, workplace: Path) -> Path:
    shutil.copytree(world.data, "data")
    return Path("data")


@pytest.fixture
def trained(world: World, workplace: Path) -> Path:
    """A checkpoint of level L1, to be damaged."""
    xsd("train", *world.train_flags, "--num_epochs", 1)
    [folder] = Path("outputs/train/L1").iterdir()
    return folder.rename("checkpoint")


def extract(world: World, scenes: Path, *more: object) -> list[object]:
    asked = ["--max_questions", 1, "--max_new_tokens", 4, "--batch_clips", 2, "--split", "train"]
    given = ["--dataset_dir", scenes, "--output_dir", "hidden"]
    return ["extract", *world.pair_flags, *given, *asked, *more]


def train(world: World, data: Path, *more: object) -> list[object]:
    return ["train", *world.train_flags, "--num_epochs", 1, "--data", data, *more]


# --- the command line and recipes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "unknown command"),
        ("train --num_epoch 3", "unknown flag --num_epoch, did you mean 'num_epochs'"),
        ("train --level", "flag --level needs a value"),
        ("train stray", "unexpected argument 'stray'"),
        ("train --level L9", "unknown level 'L9'; choose 1-6 or one of L1, "),
        ("train --level 7", "unknown level '7'"),
        ("evaluate --level 0", "unknown level '0'"),
        ("train --loss mse", "--loss: 'mse' is not one of feature, token or null"),
        ("train --num_epochs 0", "num_epochs=0: must be at least 1"),
        ("train --num_epochs many", "--num_epochs: 'many' is not int"),
        ("train --learning_rate nan", "--learning_rate: 'nan' is not float"),
        ("train --batch_size -4", "batch_size=-4: must be at least 1"),
        ("train --seed -1", "seed=-1: must not be negative"),
        ("train --num_event_images 0", "--num_event_images 0: must be at least 1"),
        ("train --bottleneck_dim -3", "bottleneck_dim=-3: must be at least 1"),
        ("train --num_heads 0", "num_heads=0: must be at least 1"),
        ("sweep --num_trials 0", "num_trials=0: must be at least 1"),
        ("sweep --dropout 2", "dropout=2.0: must be at least 0 and below 1"),
        ("extract --max_samples 0", "max_samples=0: must be at least 1, or -1 for all"),
        ("extract --split val", "--split: 'val' is not one of all, train, test"),
        ("scenes --num_train -1", "num_train, num_val and num_test must not be negative"),
        ("scenes --size 7", "size even and at least 32"),
        ("scenes --event_camera.noise_rate_hz -1", "noise_rate_hz=-1.0: must not be negative"),
        ("scenes --event_camera.contrast_threshold 0", "must be above 0"),
        ("evaluate --gamma 0", "gamma=0: must be at least 1"),
        ("evaluate --pass_ms a:b", "write rows:ms, such as 6:52,22:68"),
        ("benchmark --configs L9+VL", "config 'L9+VL' is unknown; known: vl_baseline, "),
        ("benchmark --gamma 0", "gamma=0: must be at least 1"),
        ("benchmark --max_samples 0", "max_samples=0: must be at least 1, or -1 for all"),
        ("benchmark --repeats 0", "repeats=0: must be at least 1"),
        ("benchmark --warmup -1", "warmup=-1: must not be negative"),
        ("benchmark --max_new_tokens 0", "max_new_tokens=0: must be at least 1"),
        ("promote --num_answers 0", "num_answers=0: must be at least 1"),
        ("levels --dim 7", "must be a positive multiple of the 8 attention heads"),
    ],
)
def test_a_slip_in_the_command_line(refused: Refused, words: str, message: str) -> None:
    assert message in refused(*words.split())


def test_an_unknown_precision_is_refused_by_every_command_that_loads_a_pair(
    refused: Refused,
) -> None:
    modules = {command: importlib.import_module(path) for command, path in COMMANDS.items()}
    takers = [name for name, found in modules.items() if issubclass(found.Config, PairConfig)]
    assert {"extract", "train", "benchmark", "generate"} <= set(takers)
    for command in takers:
        line = refused(command, "--quant", "3bit")
        assert "--quant 3bit: choose one of 4bit, 8bit, fp16, bf16, fp32" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train: [open", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"- train", "a recipe is a mapping of sections"),
        (b"trian: {}", "unknown section or shared key 'trian'"),
        (b"train: 3", "section 'train' must be a mapping"),
        (b"train: []", "section 'train' must be a mapping"),
        (b"train: {num_epoch: 3}", "unknown key 'num_epoch', did you mean 'num_epochs'?"),
        (b"train: {num_epochs: many}", "num_epochs: 'many' is not int"),
        (b"train: {level: 9}", "unknown level 9"),
        (b"train.L9: {num_epochs: 3}", "unknown level 'L9'"),
        (b"seed: abc", "seed: 'abc' is not int"),
        (b"benchmark: {warm: 3}", "section 'benchmark': unknown key 'warm'"),
    ],
)
def test_a_slip_in_a_recipe(refused: Refused, text: bytes, message: str) -> None:
    Path("recipe.yaml").write_bytes(text)
    line = refused("train", "--config", "recipe.yaml")
    assert message in line and ("recipe.yaml" in line or "level" in message)


def test_a_recipe_that_is_not_there(refused: Refused) -> None:
    assert "nope.yaml: cannot be read (No such file" in refused("train", "--config", "nope.yaml")
    assert "cannot be read (Is a directory)" in refused("train", "--config", ".")
    assert "nope.yaml: no such recipe" in refused("main", "--recipe", "nope.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--levels L1,L9", "unknown level 'L9'"),
        ("--levels L4:fast", "--levels L4:fast: a level is followed by nothing, :feature or :free"),
        ("--levels ,", "names no level to train"),
        ("--levels L4 --two_phase L4+L5F", "--two_phase L4+L5F: write GAP+HEAD, both of them"),
    ],
)
def test_the_pipeline_checks_its_plan_before_the_first_stage(
    refused: Refused, flags: str, message: str
) -> None:
    Path("recipe.yaml").write_text("seed: 0\n")
    assert message in refused("main", "--recipe", "recipe.yaml", *flags.split())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quant: 3bit", "--quant 3bit: choose one of 4bit, "),
        ("benchmark: {warmup: -1}", "warmup=-1: must not be negative"),
    ],
)
def test_the_pipeline_checks_its_recipe_before_the_first_stage(
    refused: Refused, runs: Callable[..., list[Any]], recipe: str, message: str
) -> None:
    Path("recipe.yaml").write_text(recipe)
    assert message in refused("main", "--recipe", "recipe.yaml")
    assert runs("scenes") == []


def test_an_unknown_pair_costs_nothing(refused: Refused, runs: Callable[..., list[Any]]) -> None:
    for stage in ("lm_head", "extract", "train"):
        assert "unknown pair 'huge'" in refused(stage, "--pair", "huge")
    assert runs("scenes") == []


# --- scenes ---------------------------------------------------------------------------------------

COUNT = np.arange(50)
GOOD: dict[str, Any] = {
    "x": COUNT.astype(np.uint16),
    "y": COUNT.astype(np.uint16),
    "t": COUNT.astype(np.uint32),
    "p": (COUNT % 2).astype(np.uint8),
}


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("hostile_code_ran",)


def _events(**changes: object) -> Damage:
    kept = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}

    def write(path: Path) -> None:
        np.save(path, np.array(kept, dtype=object), allow_pickle=True)

    return write


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("files", "damage", "message"),
    [
        ("event_npy", Path.unlink, "cannot be read (No such file or directory); check the path"),
        ("event_npy", _events(x=Hostile()), "not an event file (it names posix.mkdir"),
        ("event_npy", _events(t=None, time=GOOD["t"]), "no t among the keys"),
        ("event_npy", _events(**{key: GOOD[key][:0] for key in GOOD}), "it holds no events"),
        ("event_npy", _events(y=GOOD["y"][:9]), "x, y, t, p differ in length: [50, 9, 50, 50]"),
        ("event_npy", _events(**{key: GOOD[key][:3] for key in GOOD}), "3 events cannot fill 5"),
        ("event_npy", _cut, "not an event file"),
        ("mp4", Path.unlink, "cannot be read (No such file or directory); check the path"),
        ("mp4", lambda path: path.write_bytes(b"no film"), "cannot be decoded"),
        ("mp4", _cut, "cannot be decoded"),
    ],
)
def test_media_that_cannot_be_read(
    world: World, refused: Refused, scenes: Path, files: str, damage: Damage, message: str
) -> None:
    for path in sorted((scenes / files).glob("train*/*")):
        damage(path)
    line = refused(*extract(world, scenes))
    assert "more than --max_failures 0.02 allows; the last: train_" in line and message in line
    assert not Path("hostile_code_ran").exists()
    with pytest.raises(XsdError, match="was interrupted"):
        HiddenStore.open(next(Path("hidden").iterdir()))


def test_a_failed_clip_is_counted_with_its_reason_and_mended(
    world: World, refused: Refused, scenes: Path, runs: Callable[..., list[Any]]
) -> None:
    video = next((scenes / "mp4/train_0001").glob("*"))
    whole = video.read_bytes()
    video.write_bytes(b"no film")
    assert "1 of 6 answers failed" in refused(*extract(world, scenes))
    xsd(*extract(world, scenes, "--max_failures", 0.2, "--output_dir", "counted"))
    [run] = runs("extract")
    assert run.data.metrics["train.num_failures"] == 1
    assert run.data.metrics["train.num_samples"] == 5
    [failure] = HiddenStore.open(next(Path("counted").iterdir())).failures
    assert failure.key.startswith("train_0001/") and "cannot be decoded" in failure.reason
    video.write_bytes(whole)
    xsd(*extract(world, scenes, "--output_dir", "mended"))
    assert not HiddenStore.open(next(Path("mended").iterdir())).failures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event_data": "../../../etc/passwd"}, "leaves the folder; remove it from the index"),
        ({"mp4_data": "/etc/passwd"}, "leaves the folder; remove it from the index"),
        ({"event_image": ["/etc/passwd"]}, "leaves the folder; remove it from the index"),
        ({"event_image": 3}, "event_image is not a path or a list of paths"),
        ({"event_data": "event_npy/\0/1.npy"}, "event_data is not a path"),
        ({"split": "dev"}, "split 'dev' is not train, val or test"),
        ({"mp4_data": None}, "neither mp4_data nor video_data"),
    ],
)
def test_an_index_of_scenes_is_not_trusted(
    world: World, refused: Refused, scenes: Path, change: dict[str, Any], message: str
) -> None:
    entries = json.loads((scenes / INDEX_NAME).read_text())
    entries[0].update(change)
    write_json(scenes / INDEX_NAME, entries)
    assert message in refused(*extract(world, scenes))
    assert message in refused("scenes", "--source", "prepared", "--dataset_dir", scenes)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no EventGPT"), ("{", "cannot be read as JSON"), ("{}", "not a list"), ("[]", "no sc")],
)
def test_an_index_of_scenes_that_is_none(
    world: World, refused: Refused, scenes: Path, text: str | None, message: str
) -> None:
    index = scenes / INDEX_NAME
    index.unlink() if text is None else index.write_text(text)
    assert message in refused(*extract(world, scenes))


def test_scenes_that_are_not_there(world: World, refused: Refused) -> None:
    assert "nope: no such file or folder" in refused(*extract(world, Path("nope")))
    assert "runs:/nope: no such run" in refused(*extract(world, Path("runs:/nope")))
    line = refused("scenes", "--source", "prepared", "--dataset_dir", "nope")
    assert "an existing folder; got nope" in line


def test_a_split_that_is_empty(world: World, refused: Refused, scenes: Path) -> None:
    entries = json.loads((scenes / INDEX_NAME).read_text())
    write_json(scenes / INDEX_NAME, [entry for entry in entries if entry["split"] != "test"])
    assert "no test scenes to extract" in refused(*extract(world, scenes, "--split", "test"))
    # Training answers alone can neither validate nor be scored.
    index = next(world.data.glob("chunked_train*")) / "index.json"
    shutil.copytree(index.parent, "no_val")
    Path("no_val/index.json").write_text(index.read_text().replace('"val"', '"train"'))
    assert "its val split is empty; give --val_data" in refused(*train(world, Path("no_val")))


def test_training_answers_are_not_for_scoring(
    world: World, refused: Refused, trained: Path
) -> None:
    given = ["--checkpoint", trained, "--lm_head", world.head]
    line = refused("evaluate", *given, "--data", next(world.data.glob("chunked_train*")))
    assert "its test split is empty; give --data with test answers" in line


# --- hidden states --------------------------------------------------------------------------------


def _altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("level", "files", "damage", "message"),
    [
        ("L1", "chunks", _cut, "it was cut off or altered"),
        ("L1", "chunks", _altered, "its sha256 is not the index's; it was altered"),
        ("L1", "chunks", Path.unlink, "missing, though the index names it"),
        ("X1", "visual", _cut, "it was cut off or altered"),
        ("E3", "visual", _altered, "its sha256 is not the index's; it was altered"),
    ],
)
def test_a_chunk_that_was_damaged(
    world: World,
    refused: Refused,
    data: Path,
    level: str,
    files: str,
    damage: Damage,
    message: str,
) -> None:
    for path in sorted(data.glob(f"chunked_train*/{files}/*")):
        damage(path)
    assert message in refused(*train(world, data, "--level", level))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": None}, "not an index of hidden states"),
        ({"complete": False}, "its extraction was interrupted; run it again"),
        ("outside", "leaves the folder; remove it from the index"),
    ],
)
def test_an_index_of_chunks_is_not_trusted(
    world: World, refused: Refused, data: Path, change: Any, message: str
) -> None:
    [path] = data.glob("chunked_train*/index.json")
    index = json.loads(path.read_text())
    if change == "outside":
        index["chunks"][0]["path"] = "../../../../etc/passwd"
    else:
        index.update(change)
    write_json(path, index)
    assert message in refused(*train(world, data))


def test_data_that_are_none(world: World, refused: Refused) -> None:
    Path("empty").mkdir()
    Path("junk.pt").write_bytes(b"junk")
    torch.save({"egpt_hidden": Hostile()}, "hostile.pt")
    assert "no such file or folder" in refused(*train(world, Path("nope")))
    assert "no hidden states of the train split" in refused(*train(world, Path("empty")))
    for name in ("junk.pt", "hostile.pt"):
        assert "not a chunk of hidden states" in refused(*train(world, Path(name)))
    assert not Path("hostile_code_ran").exists()
    assert "no such file or folder" in refused(*train(world, world.data, "--val_data", "nope"))


def test_a_head_of_another_verifier(world: World, refused: Refused, trained: Path) -> None:
    shutil.copytree(world.head, "head")
    _cut(Path("head/lm_head.safetensors"))
    assert "missing or altered" in refused(*train(world, world.data, "--lm_head", "head"))
    assert "no LM head; make one" in refused(*train(world, world.data, "--lm_head", trained))


def test_a_loss_that_is_not_finite(
    world: World, refused: Refused, runs: Callable[..., list[Any]]
) -> None:
    """In training, or, if the first step is the last one, in validation."""
    for epochs in (1, 3):
        line = refused(*train(world, world.data, "--learning_rate", 1e30, "--num_epochs", epochs))
        assert "became nan in epoch 0" in line and "lower --learning_rate" in line
    assert runs("train") == []


# --- checkpoints ----------------------------------------------------------------------------------


def _set(**changes: object) -> Damage:
    def write(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        about["adapter"].update(changes)
        write_json(folder / "config.json", about)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set(d_drafter=64), "made for widths (64, 32), not (24, 32)"),
        (_set(level="L9"), "unknown level 'L9'"),
        (_set(bottleneck_dim=16), "does not fit its config.json"),
        (_set(num_heads="8"), "is not an adapter's configuration"),
        (lambda folder: write_json(folder / "config.json", [1]), "is not an adapter's config"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be read as JSON"),
        (lambda folder: _cut(folder / "best_model.safetensors"), "the file was altered"),
        (lambda folder: (folder / "best_model.safetensors").unlink(), "no such checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    world: World, refused: Refused, trained: Path, damage: Damage, message: str
) -> None:
    damage(trained)
    given = ["--checkpoint", trained, "--data", world.data, "--lm_head", world.head]
    assert message in refused("evaluate", *given)


def test_a_checkpoint_of_another_level(world: World, refused: Refused, trained: Path) -> None:
    given = ["--data", world.data, "--lm_head", world.head]
    wanted = refused("evaluate", "--checkpoint", trained, *given, "--level", "L4")
    assert "holds level L1, wanted L4" in wanted
    both = ["--prefill_checkpoint", trained, "--decode_checkpoint", trained]
    assert "L1 does not draft in the decode phase" in refused("two_phase", *both, *given)
    assert "batch_size=0" in refused("evaluate", "--checkpoint", trained, *given, "--batch_size", 0)
    assert "only an adapter of a tracked run" in refused("promote", "--candidate", trained)
    Path("adapters").mkdir()
    shutil.copytree(trained, "adapters/L2")
    bench = ["--dataset_dir", world.scenes, "--data", world.data, "--configs", "L2+VL"]
    line = refused("benchmark", *world.pair_flags, *bench, "--adapter_dir", "adapters")
    assert "holds level L1, wanted L2" in line
    assert "nope/L2: no such file" in refused("benchmark", *bench, "--adapter_dir", "nope")


# --- where runs and files go ----------------------------------------------------------------------


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

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xsd.hidden.writer.save_file", full)
    assert "No space left on device" in refused(*extract(world, world.scenes))


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

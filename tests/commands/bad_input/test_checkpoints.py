"""Adapters that were damaged, or belong elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.commands.bad_input.conftest import Damage, Refused, cut
from tests.commands.conftest import World
from xsd.files import write_json


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
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json beside it"),
        (lambda folder: cut(folder / "best_model.safetensors"), "the file was altered"),
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

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.conftest import D_DRAFTER, D_VERIFIER, make_adapter, make_streams
from xsd.adapters import checkpoint
from xsd.adapters.catalog import LEVELS
from xsd.errors import XsdError
from xsd.files import sha256_file


@pytest.mark.parametrize("name", LEVELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    adapter, streams = make_adapter(name), make_streams()
    checkpoint.save(adapter, tmp_path, extra={"pair": "tiny", "conditioning": "teacher_forced"})
    loaded, config = checkpoint.load(
        tmp_path, expect_level=name, expect_widths=(D_DRAFTER, D_VERIFIER)
    )
    assert torch.equal(loaded(streams), adapter(streams))
    assert loaded.config == adapter.config and not loaded.training
    assert config["extra"]["pair"] == "tiny"
    assert config["num_parameters"] == sum(p.numel() for p in adapter.parameters())


def test_two_names_share_a_folder(tmp_path: Path) -> None:
    adapter = make_adapter("L1")
    folder = tmp_path / "run"
    checkpoint.save(adapter, folder)
    last = checkpoint.save(adapter, folder, name="final_model")
    assert last.name == "final_model.safetensors"
    checkpoint.load(folder)
    checkpoint.load(last)
    assert sorted(p.name for p in folder.iterdir()) == [
        "best_model.safetensors",
        "config.json",
        "final_model.safetensors",
    ]


def resign(folder: Path) -> None:
    """Make config.json vouch for whatever stands there now."""
    config = json.loads((folder / "config.json").read_text())
    config["sha256"]["best_model"] = sha256_file(folder / "best_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_each_fault_is_one_line(tmp_path: Path) -> None:
    weights = checkpoint.save(make_adapter("L1"), tmp_path)
    whole = weights.read_bytes()

    def fails(match: str, **expect: object) -> None:
        with pytest.raises(XsdError, match=match) as caught:
            checkpoint.load(tmp_path, **expect)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    fails("holds level L1, wanted L4", expect_level=4)
    fails("made for widths", expect_widths=(32, 32))
    weights.write_bytes(whole[:-4])
    fails("altered")
    resign(tmp_path)
    fails("does not fit")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({**tensors, "layers.1.weight": torch.full((D_VERIFIER,), torch.nan)}, weights)
    resign(tmp_path)
    fails("not finite")
    save_file({"layers.1.weight": tensors["layers.1.weight"]}, weights)
    resign(tmp_path)
    fails("does not fit")
    (tmp_path / "config.json").write_text("[]")
    fails("not an adapter's configuration")
    (tmp_path / "config.json").write_text("{")
    fails("cannot be read as JSON")
    weights.unlink()
    fails("no such checkpoint")

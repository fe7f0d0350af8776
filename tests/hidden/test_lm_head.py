from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hidden import miniature
from xsd.errors import XsdError
from xsd.hidden import lm_head

ROWS = len(miniature.TOKENIZER)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    miniature.save_pair(folder)
    return folder / "verifier"


def test_round_trip_keeps_rows_and_gives_the_models_own_ends(
    checkpoint: Path, tmp_path: Path
) -> None:
    files = lm_head.save(lm_head.read_tensors(checkpoint), tmp_path / "lm_head.safetensors", "x")
    assert [path.name for path in files] == [
        "lm_head.safetensors",
        "embed_tokens.safetensors",
        "lm_head.json",
    ]
    _, verifier = miniature.models()
    for path in (tmp_path, tmp_path / "lm_head.safetensors"):
        head = lm_head.load(path)
        assert head.lm_head.shape == (ROWS, 32) and head.provenance == "x"
        assert torch.equal(head.lm_head, verifier.lm_head.weight)
        assert torch.equal(head.embed_tokens, verifier.model.language_model.embed_tokens.weight)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_names_of_every_release_and_the_checkpoints_dtype(tmp_path: Path, suffix: str) -> None:
    tensors = {
        "language_model.lm_head.weight": torch.randn(7, 4).half(),
        "language_model.model.embed_tokens.weight": torch.randn(6, 4).half(),
        "language_model.model.norm.weight": torch.ones(4).half(),
    }
    path = tmp_path / f"model-00001-of-00001.{suffix}"
    if suffix == "bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    found = lm_head.read_tensors(tmp_path)
    assert {key: (tuple(x.shape), x.dtype) for key, x in found.items()} == {
        "lm_head": ((7, 4), torch.float16),
        "embed_tokens": ((6, 4), torch.float16),
    }
    lm_head.save(found, tmp_path / "out/lm_head.safetensors", "")
    assert load_file(tmp_path / "out/lm_head.safetensors")["lm_head"].dtype == torch.float16


def test_tied_heads(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.randn(6, 4)}, tmp_path / "model.safetensors")
    found = lm_head.read_tensors(tmp_path)
    assert torch.equal(found["lm_head"], found["embed_tokens"])


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(XsdError, match=r"neither .safetensors nor .bin"):
        lm_head.read_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(XsdError, match="weights cannot be read"):
        lm_head.read_tensors(tmp_path)
    save_file({"a.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(XsdError, match=r"none of its tensors is embed_tokens.weight"):
        lm_head.read_tensors(tmp_path)


def test_altered_heads_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(XsdError, match="make one with 'xsd lm_head'"):
        lm_head.load(tmp_path)
    files = lm_head.save(lm_head.read_tensors(checkpoint), tmp_path / "lm_head.safetensors", "x")
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(XsdError, match=r"embed_tokens.safetensors: missing or altered"):
        lm_head.load(tmp_path)
    files[2].write_text('{"lm_head": 3}')
    with pytest.raises(XsdError, match="not the index of an LM head"):
        lm_head.load(tmp_path)

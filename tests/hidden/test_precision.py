"""What rounding costs, and what it saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.hidden.test_chunk import SAMPLES
from tests.hidden.test_store import CONFIG, run
from xsd.hidden.check import stats
from xsd.hidden.chunk import Chunk, read_chunk, write_chunk
from xsd.hidden.place import Place
from xsd.hidden.precision import decode, encode
from xsd.hidden.sample import HiddenSample
from xsd.hidden.store import HiddenStore
from xsd.pairs.base import ModelPair
from xsd.types import Scene


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_fp8_keeps_every_position_within_a_sixteenth(magnitude: float) -> None:
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * magnitude
    states[0] = 0
    stored, scale = encode(states, "fp8")
    assert stored.dtype == torch.float8_e4m3fn and scale is not None and scale.shape == (50,)
    back = decode(stored, scale)
    assert back.isfinite().all() and (back[0] == 0).all()
    # Half a step of 3 bits of mantissa; what is tiny beside the largest may lose more.
    large = states.abs() > states.abs().amax(-1, keepdim=True) * 2**-12
    error = (back - states).abs()
    assert (error[large] <= states.abs()[large] / 16 * 1.001).all()


def test_rounding_again_changes_nothing() -> None:
    states = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    once = decode(*encode(states, "fp8"))
    torch.testing.assert_close(decode(*encode(once, "fp8")), once, rtol=1e-6, atol=0)
    assert encode(states, "fp32") == (states, None) or encode(states, "fp32")[0] is states


def test_fp8_chunks_hold_their_factors(tmp_path: Path) -> None:
    path = tmp_path / "chunk.safetensors"
    layered = [
        replace(sample, verifier_layers=torch.randn(len(sample.verifier_ids), 2, 4))
        for sample in SAMPLES
    ]
    write_chunk(Chunk.of(layered, "fp8"), path)
    chunk = read_chunk(path)
    for row, expected in enumerate(layered):
        found = chunk.sample(row, expected.key)
        assert found.verifier_hidden.dtype == torch.float32
        assert torch.equal(found.verifier_ids, expected.verifier_ids.int())
        torch.testing.assert_close(
            found.verifier_layers, expected.verifier_layers, rtol=0.07, atol=0.02
        )
        torch.testing.assert_close(
            found.drafter_hidden, expected.drafter_hidden, rtol=0.07, atol=0.02
        )


def test_chunks_join_as_they_are_stored() -> None:
    whole = Chunk.of(SAMPLES, "fp8").tensors()
    parts = Chunk.cat([Chunk.of(SAMPLES[:1], "fp8"), Chunk.of(SAMPLES[1:], "fp8")]).tensors()
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), parts[name].view(torch.uint8)), name


def wide(width: int, count: int) -> list[HiddenSample]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, 51, (count,), generator=draw).tolist()
    return [
        HiddenSample(
            key=f"r/{number:06d}/q0",
            drafter_hidden=torch.randn(length, width, generator=draw),
            verifier_hidden=torch.randn(length, width, generator=draw),
            drafter_ids=torch.zeros(length, dtype=torch.int32),
            verifier_ids=torch.zeros(length, dtype=torch.int32),
        )
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(("dtype", "share"), [("bf16", 0.52), ("fp8", 0.28), ("fp32", 1.02)])
@pytest.mark.parametrize("width", [128, 4096])
def test_pairs_with_ids_take_half_of_fp32(
    tmp_path: Path, width: int, dtype: str, share: float
) -> None:
    """The whole file against the fp32 states of real positions, at the tiny and the 7B width."""
    answers = wide(width, 40)
    path = tmp_path / "chunk.safetensors"
    write_chunk(Chunk.of(answers, dtype), path)
    fp32 = sum(4 * 2 * width * len(answer.verifier_ids) for answer in answers)
    assert path.stat().st_size <= share * fp32


def test_a_store_in_fp8(pair: ModelPair, scenes: list[Scene], tmp_path: Path) -> None:
    exact = HiddenStore.open(run(pair, scenes, tmp_path / "a", replace(CONFIG, dtype="fp32")))
    small = HiddenStore.open(run(pair, scenes, tmp_path / "b", replace(CONFIG, dtype="fp8")))
    assert small.keys() == exact.keys()
    for one, other in zip(exact, small, strict=True):
        assert torch.equal(one.verifier_ids, other.verifier_ids)
        cosine = torch.cosine_similarity(one.verifier_hidden, other.verifier_hidden, dim=-1)
        assert (cosine > 0.998).all()
    # Visual states are few and stay in bf16.
    visual = small.visual(scenes[0].key)
    assert visual.projected.dtype == torch.bfloat16
    found = stats(Place(str(tmp_path / "b")))
    assert found.visual_bytes == small.num_visual_bytes > 0
    assert found.pair_bytes == small.num_bytes

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xsd.errors import XsdError
from xsd.hidden.chunk import UNKNOWN_ID, Chunk, read_chunk, write_chunk
from xsd.hidden.sample import HiddenSample


def sample(num_drafter: int, num_verifier: int, seed: int = 0) -> HiddenSample:
    random = torch.Generator().manual_seed(seed)
    return HiddenSample(
        key=f"r/000000/q{seed}",
        drafter_hidden=torch.randn(num_drafter, 3, generator=random),
        verifier_hidden=torch.randn(num_verifier, 4, generator=random),
        drafter_ids=torch.randint(0, 90, (num_drafter,), generator=random),
        verifier_ids=torch.randint(0, 90, (num_verifier,), generator=random),
    )


SAMPLES = [sample(5, 2, 0), sample(1, 4, 1), sample(3, 3, 2)]


def assert_same(one: HiddenSample, other: HiddenSample) -> None:
    for name in ("drafter_hidden", "verifier_hidden", "drafter_ids", "verifier_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name).to(getattr(one, name).dtype))


def test_ragged_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "chunks" / "chunk_000000.safetensors"
    write_chunk(Chunk.of(SAMPLES, "fp32"), path)
    chunk = read_chunk(path)
    assert len(chunk) == 3
    for row, expected in enumerate(SAMPLES):
        assert_same(chunk.sample(row, expected.key), expected)


def test_bf16_rounds_states_only() -> None:
    chunk = Chunk.of(SAMPLES, "bf16")
    assert chunk.verifier_hidden.dtype == torch.bfloat16
    assert torch.equal(chunk.sample(1, "").verifier_ids, SAMPLES[1].verifier_ids.int())


def test_padded_round_trip_cuts_pairs_to_the_shorter(tmp_path: Path) -> None:
    path = tmp_path / "chunk_000000.pt"
    write_chunk(Chunk.of(SAMPLES, "fp32"), path)
    content = torch.load(path, weights_only=True)
    assert {k: (tuple(v.shape), v.dtype) for k, v in content.items()} == {
        "egpt_hidden": ((3, 3, 3), torch.float32),
        "vl_hidden": ((3, 3, 4), torch.float32),
        "seq_lens": ((3,), torch.int64),
    }
    chunk = read_chunk(path)
    for row, expected in enumerate(SAMPLES):
        found = chunk.sample(row, "")
        shorter = min(len(expected.drafter_ids), len(expected.verifier_ids))
        assert torch.equal(found.drafter_hidden, expected.drafter_hidden[:shorter])
        assert torch.equal(found.verifier_hidden, expected.verifier_hidden[:shorter])
        assert found.verifier_ids.tolist() == [UNKNOWN_ID] * shorter


def test_the_same_answers_make_the_same_bytes(tmp_path: Path) -> None:
    for suffix in ("safetensors", "pt"):
        paths = [tmp_path / folder / f"chunk.{suffix}" for folder in "ab"]
        for path in paths:
            write_chunk(Chunk.of(SAMPLES, "fp32"), path)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def seed_chunk(**changes: object) -> dict[str, object]:
    plain = {
        "egpt_hidden": torch.zeros(2, 4, 3),
        "vl_hidden": torch.zeros(2, 4, 3),
        "seq_lens": torch.tensor([4, 1]),
    }
    return {**plain, **changes}


def test_seed_chunks_may_hold_more_keys(tmp_path: Path) -> None:
    path = tmp_path / "chunk.pt"
    torch.save(seed_chunk(metadata={"quant": "4bit", "when": [1, 2]}), path)
    assert [len(read_chunk(path).sample(row, "").verifier_ids) for row in (0, 1)] == [4, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "does not hold a dict"),
        ({"egpt_hidden": torch.zeros(2, 4, 3)}, "must hold the tensors egpt_hidden, vl_hidden"),
        (seed_chunk(vl_hidden=torch.zeros(2, 5, 3)), r"not \[answers, positions, width\]"),
        (seed_chunk(seq_lens=torch.tensor([4])), "seq_lens for 2 answers"),
        (seed_chunk(seq_lens=torch.tensor([5, 1])), "leave the range 1 to 4"),
        (seed_chunk(seq_lens=torch.tensor([4, 0])), "leave the range 1 to 4"),
    ],
)
def test_malformed_seed_chunks(tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "chunk.pt"
    torch.save(content, path)
    with pytest.raises(XsdError, match=reason):
        read_chunk(path)


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("hostile-was-here"),))


def test_no_pickled_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(seed_chunk(metadata=Hostile()), "one.pt")
    Path("two.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("one.pt", "two.pt"):
        with pytest.raises(XsdError, match=f"{name}: not a chunk"):
            read_chunk(Path(name))
    assert not Path("hostile-was-here").exists()


def test_malformed_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "chunk.safetensors"
    tensors = Chunk.of(SAMPLES, "fp32").tensors()
    path.write_bytes(b"")
    with pytest.raises(XsdError, match="not a chunk"):
        read_chunk(path)
    save_file({k: v for k, v in tensors.items() if k != "verifier_ids"}, path)
    with pytest.raises(XsdError, match="it lacks verifier_ids"):
        read_chunk(path)
    total = int(tensors["drafter_offsets"][-1])
    # Beyond the rows, backwards, and an answer of no tokens.
    for offsets in ([0, 5, 6, total + 1], [0, 5, 4, total], [0, 5, 5, total]):
        save_file({**tensors, "drafter_offsets": torch.tensor(offsets)}, path)
        with pytest.raises(XsdError, match="drafter offsets do not fit"):
            read_chunk(path)

"""The drafter in a process of its own: what it needs, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hidden import miniature
from xsd import bench
from xsd.adapters import checkpoint
from xsd.adapters.catalog import build
from xsd.adapters.config import AdapterConfig
from xsd.bench import BenchItem
from xsd.decoding.config import BASELINE, DecodingConfig
from xsd.decoding.strategies import parse
from xsd.decoding.tables import VerifierTables
from xsd.errors import XsdError
from xsd.pairs.catalog import load_drafter, load_pair
from xsd.pairs.config import PairConfig
from xsd.types import Trace


def save_adapter(folder: Path, level: str = "E2") -> Path:
    torch.manual_seed(0)
    config = AdapterConfig(
        level=level,
        d_drafter=miniature.D_DRAFTER,
        d_verifier=miniature.D_VERIFIER,
        num_heads=4,
        ffn_dim=16,
    )
    checkpoint.save(build(config), folder)
    return folder


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_the_worker_drafts_alike_without_the_verifiers_weights(
    weights: str, items: list[BenchItem], tmp_path: Path
) -> None:
    saved = miniature.save_pair(tmp_path / "pair")
    config = PairConfig(**{**vars(saved), "weights": weights})
    pair = load_pair(config)
    adapters = {name: save_adapter(tmp_path / name, name) for name in ("E2", "L4")}
    # What is gone from the disk can be known to the worker through shared memory only.
    (tmp_path / "pair/verifier/model.safetensors").unlink()
    with pytest.raises(XsdError, match="weights cannot be loaded"):
        load_pair(saved)
    traces = {}
    for overlap in ("inline", "process"):
        records = bench.run(
            pair, config, items, [parse(BASELINE, 0), parse("L4+E2", 3)], adapters, {},
            DecodingConfig(max_new_tokens=12, overlap=overlap),
            repeats=1, warmup=0, timed=False,
        )  # fmt: skip
        found = [record for record in records if isinstance(record, Trace)]
        assert len(found) == 2 * len(items) and all(trace.lossless for trace in found)
        traces[overlap] = [(t.token_ids, t.cycle_drafted, t.cycle_accepted) for t in found]
    assert traces["inline"] == traces["process"]
    assert any(drafted for _, drafted, _ in traces["process"])


def test_the_drafter_alone_chooses_among_the_pairs_ids(tmp_path: Path) -> None:
    config = miniature.save_pair(tmp_path)
    pair = load_pair(config)
    alone = load_drafter(config, pair.vocab_size - 2)
    assert torch.equal(alone.lm_head.weight, pair.drafter.lm_head.weight[:-2])
    assert alone.logits(torch.zeros(3, alone.width)).shape == (3, pair.vocab_size - 2)


def test_a_head_with_bias_keeps_it_when_ids_are_cut_off() -> None:
    decoder = load_drafter(PairConfig("tests.pairs.third_pair"), 40)
    head = torch.nn.Linear(decoder.width, 40).requires_grad_(False)
    decoder.lm_head = head
    decoder.limit_vocab(30)
    hidden = torch.randn(3, decoder.width)
    assert torch.equal(decoder.logits(hidden), head(hidden)[:, :30]) and decoder.vocab_size == 30


def test_the_tables_are_the_verifiers_own(tmp_path: Path) -> None:
    verifier = load_pair(miniature.save_pair(tmp_path)).verifier
    tables = VerifierTables.of(verifier)
    hidden = torch.randn(3, verifier.width)
    before = verifier.logits(hidden)
    tables.share()
    assert verifier.embedding.is_shared() and torch.equal(verifier.logits(hidden), before)
    assert torch.equal(tables.score(hidden), before)


def test_shared_memory_that_is_short_is_told(
    items: list[BenchItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = miniature.save_pair(tmp_path / "pair")
    adapters = {"E2": save_adapter(tmp_path / "E2")}
    strategies = [parse(BASELINE, 0), parse("E2_decode", 3)]

    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory")

    pair = load_pair(config)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    records = bench.run(
        pair, config, items, strategies, adapters, {}, DecodingConfig(), repeats=1, warmup=0
    )
    with pytest.raises(XsdError, match=r"in shared memory \(unable.*enlarge /dev/shm, or say --ov"):
        next(iter(records))


@pytest.mark.parametrize(
    ("asked", "device", "found"),
    [
        ("auto", "cpu", "process"),
        ("auto", "cuda", "stream"),
        ("stream", "cpu", "stream"),
        ("inline", "cuda", "inline"),
    ],
)
def test_the_drafters_device_decides_how_it_overlaps(asked: Any, device: str, found: str) -> None:
    assert bench._overlap(DecodingConfig(overlap=asked), torch.device(device)) == found


def test_a_process_of_its_own_is_not_for_a_gpu() -> None:
    with pytest.raises(XsdError, match="say stream"):
        bench._overlap(DecodingConfig(overlap="process"), torch.device("cuda"))

"""Reduced precision: a difference is excused where rounding decides, counted, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoding.test_engine import Scripted
from xsd import bench
from xsd.bench import BenchItem, first_difference
from xsd.decoding.config import DecodingConfig
from xsd.decoding.engine import Engine
from xsd.decoding.near_tie import is_near_tie
from xsd.decoding.strategies import parse
from xsd.pairs.base import Decoder, Media, ModelPair, Prompt
from xsd.pairs.cache import KVCache
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.types import Trace

ROWS = 4


class Rounding(Decoder):
    """Passes of several rows move the logit of its second choice by ``noise``."""

    def __init__(self, gap: float, noise: float, dtype: torch.dtype) -> None:
        self.stack = SimpleNamespace(dtype=dtype)  # type: ignore[assignment]
        self.gap, self.noise = gap, noise

    def prompt(self, question: str) -> Prompt:
        return Prompt((), ())

    def pixels(self, media: Media) -> Tensor:
        return torch.zeros(1, 3, 1, 1)

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        return torch.zeros(3, 1)

    def prompt_embeddings(self, media: Media, question: str) -> Tensor:
        return torch.zeros(1, 3, 1)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        device = torch.device("cpu")
        return KVCache(1, batch, 1, max_length, 2, device=device, dtype=torch.float32)

    def embed(self, ids: Tensor) -> Tensor:
        return torch.ones(*ids.shape, 1)

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        return torch.full_like(x, self.noise if x.shape[1] > 1 and bool(x.any()) else 0.0)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.cat([torch.full_like(hidden, self.gap), hidden, hidden - 9], dim=-1)


@pytest.mark.parametrize(
    ("gap", "noise", "dtype", "excused"),
    [
        (0.1, 0.06, torch.bfloat16, True),
        (0.1, 0.04, torch.bfloat16, False),
        (0.1, 0.00, torch.float16, False),
        (0.1, 0.06, torch.float32, False),
    ],
)
def test_the_rule(gap: float, noise: float, dtype: torch.dtype, excused: bool) -> None:
    verifier, media = Rounding(gap, noise, dtype), Media([], np.zeros((1, 2, 2, 3), np.uint8))
    plain = [0] * 8
    assert is_near_tie(verifier, media, "?", plain, 5, {ROWS, 1}) is excused
    # Nothing comes before the first token that could have been rounded in two ways.
    assert not is_near_tie(verifier, media, "?", plain, 0, {ROWS})
    assert not is_near_tie(verifier, media, "?", plain, 5, {1})


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["bf16", "8bit", "4bit"])
def test_reduced_precision_differs_at_near_ties_only(quant: str, items: list[BenchItem]) -> None:
    pair = load_pair(PairConfig(quant=quant, device="cpu"))
    num_new = 16
    engine = Engine(pair.verifier, num_new, bench.longest_prompt(pair, items))
    for item in items[:2]:
        question = item.sample.question
        plain = engine.plain(item.media, question).token_ids
        assert engine.plain(item.media, question).token_ids == plain
        for gap, gamma, period in ((0, 3, 2), (8, 0, 0)):
            said = engine.speculate(item.media, question, Scripted(plain, period, gap), gamma)
            differs = first_difference(said.token_ids, plain)
            rows = {said.gap_drafted, *(drafted + 1 for drafted in said.cycle_drafted)} - {0}
            assert differs is None or is_near_tie(
                pair.verifier, item.media, question, plain, differs, rows
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quant", "configs"),
    [
        (
            "bf16",
            "drafter+VL,L4+VL,L4+VL:free,X1+VL,L5_decode,B1_decode,L5F_decode,E2_decode,X1+E3",
        ),
        ("8bit", "E1_decode"),
    ],
)
def test_the_benchmark_counts_them(
    quant: str, configs: str, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    config = PairConfig(quant=quant, device="cpu")
    pair = load_pair(config)
    decoding = DecodingConfig(max_new_tokens=10, overlap="inline", max_gap_drafts=6)
    strategies = [parse(name, 3) for name in ("vl_baseline", *configs.split(","))]
    records = list(
        bench.run(
            pair, config, items[:1], strategies, adapters, {}, decoding,
            repeats=1, warmup=0, timed=False,
        )
    )  # fmt: skip
    traces = [record for record in records if isinstance(record, Trace)]
    assert len(traces) == len(strategies), records
    assert all(trace.lossless for trace in traces)
    assert all(trace.first_difference is not None for trace in traces if trace.near_tie)


def test_full_precision_is_never_excused(pair: ModelPair, items: list[BenchItem]) -> None:
    plain = list(range(300, 312))
    assert not is_near_tie(pair.verifier, items[0].media, "What?", plain, 5, {4})

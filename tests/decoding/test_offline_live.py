"""The accept length counted offline is the one that happens live, sample by sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xsd import bench
from xsd.adapters import checkpoint
from xsd.adapters.base import Streams
from xsd.adapters.catalog import LEVELS, build, configure
from xsd.adapters.collate import collate
from xsd.adapters.config import AdapterSizes
from xsd.bench import BenchItem
from xsd.decoding.config import BASELINE, DecodingConfig
from xsd.decoding.strategies import config_of, parse
from xsd.hidden.sample import ClipVisual, HiddenSample
from xsd.hidden.visual import pool_visual
from xsd.learning.losses import adapter_loss
from xsd.metrics import score_batch
from xsd.pairs.base import ModelPair
from xsd.pairs.config import PairConfig
from xsd.pairs.generate import generate, prefill, teacher_force
from xsd.types import Trace

MAX_NEW, GAMMA = 64, 3


def _stored(pair: ModelPair, item: BenchItem) -> tuple[HiddenSample, ClipVisual]:
    """What extraction would keep of one answer."""
    verifier, drafter = pair.verifier, pair.drafter
    question = item.sample.question
    rows = verifier.prompt_embeddings(item.media, question)[0]
    (answer,) = generate(verifier, [rows], MAX_NEW)
    e_rows = drafter.prompt_embeddings(item.media, question)[0]
    (states,) = teacher_force(drafter, [e_rows], [answer.ids])
    visual = verifier.visual_tokens(verifier.pixels(item.media))
    _, prompt = prefill(verifier, [rows], 0)
    start = len(verifier.prompt(question).before)
    prefilled = prompt[0, start : start + len(visual)]
    key = item.sample.key
    sample = HiddenSample(key, states, answer.hidden, answer.ids, answer.ids)
    return sample, ClipVisual(sample.scene_key, pool_visual(visual), pool_visual(prefilled))


def _streams(pair: ModelPair, stored: list[tuple[HiddenSample, ClipVisual]], name: str) -> Streams:
    visuals = {visual.scene_key: visual for _, visual in stored}
    return collate(
        [sample for sample, _ in stored],
        LEVELS[name],
        embedding=pair.verifier.embedding,
        visuals=visuals,
    )


@pytest.fixture(scope="module")
def stored(pair: ModelPair, items: list[BenchItem]) -> list[tuple[HiddenSample, ClipVisual]]:
    return [_stored(pair, item) for item in items]


@pytest.mark.parametrize("name", ["L4", "X1", "L5", "B1", "L5F", "E1", "E2", "E3", "text"])
def test_offline_counts_are_live_counts(
    name: str,
    pair: ModelPair,
    items: list[BenchItem],
    stored: list[tuple[HiddenSample, ClipVisual]],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    together = _streams(pair, stored, name)
    sizes = AdapterSizes(ffn_dim=64, num_heads=4, dropout=0.0)
    adapter = build(configure(name, pair.drafter.width, pair.verifier.width, sizes))
    lm_head = pair.verifier.lm_head.weight.detach()
    # Half-trained, so that some drafts hold and some do not.
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss = adapter_loss(adapter, together, loss="token", unroll_steps=2, lm_head=lm_head)
        loss.backward()
        optimizer.step()
    adapter.eval()
    checkpoint.save(adapter, tmp_path / name)
    is_gap = LEVELS[name].phase == "gap"
    strategy = parse(config_of(name), GAMMA)
    records = bench.run(
        pair, PairConfig(device="cpu"), items, [parse(BASELINE, 0), strategy],
        {name: tmp_path / name}, {}, DecodingConfig(max_new_tokens=MAX_NEW, overlap="inline"),
        repeats=1, warmup=0, timed=False,
    )  # fmt: skip
    live = [r for r in records if isinstance(r, Trace) and r.strategy == strategy.name]
    seen = 0
    for trace, one in zip(live, stored, strict=True):
        with torch.no_grad():
            counts = score_batch(adapter, _streams(pair, [one], name), lm_head, GAMMA).counts
        assert trace.lossless
        if is_gap:
            offline = sum(k * number for k, number in enumerate(counts.prefix_histogram))
            assert trace.gap_accepted == offline
            seen += offline
        else:
            assert len(trace.cycle_drafted) == counts.cycles[GAMMA - 1]
            seen += sum(trace.cycle_accepted)
    assert seen, "a test in which nothing is accepted shows nothing"

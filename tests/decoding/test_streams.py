"""A drafter in a thread changes no token; what it has ready is what it would draft anyhow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xsd import bench
from xsd.adapters import checkpoint
from xsd.bench import BenchItem
from xsd.clock import Stopwatch
from xsd.decoding.config import BASELINE, DecodingConfig
from xsd.decoding.engine import Engine
from xsd.decoding.speculator import LocalSpeculator
from xsd.decoding.strategies import parse
from xsd.decoding.streams import StreamSpeculator
from xsd.decoding.tables import VerifierTables
from xsd.hidden.visual import pool_visual
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.catalog import load_pair
from xsd.pairs.config import PairConfig
from xsd.types import Trace

MAX_NEW = 30
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "device_map"),
    [
        ("cpu", None),
        pytest.param("cuda", None, marks=needs_gpu),
        pytest.param("cuda", "drafter=cuda:1,verifier=cuda:0", marks=needs_two_gpus),
    ],
)
def test_the_drafters_thread_gives_the_same_answers(
    device: str, device_map: str | None, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    config = PairConfig(device=device, device_map=device_map)
    names = [
        "L4+VL",
        "X1+VL",
        "L4+VL:free",
        "E2_decode",
        "L4+L5F",
        "X1+E3",
        "X1+drafter",
        "drafter+VL",
    ]
    strategies = [parse(BASELINE, 0), *(parse(name, 3) for name in names)]
    records = list(
        bench.run(
            load_pair(config), config, items[:2], strategies, adapters, {},
            DecodingConfig(max_new_tokens=MAX_NEW, overlap="stream"),
            repeats=1, warmup=1, timed=False,
        )
    )  # fmt: skip
    for record in records:
        assert isinstance(record, Trace), record
        assert record.first_difference is None, record.strategy
        lanes = {span.lane for span in record.timeline}
        assert lanes == ({"verifier"} if record.strategy == BASELINE else {"verifier", "drafter"})


def local(pair: ModelPair, name: str, adapters: dict[str, Path], limit: int) -> LocalSpeculator:
    level = name.partition("+")[0]
    return LocalSpeculator(
        parse(name, 0), pair.drafter, VerifierTables.of(pair.verifier),
        {level: checkpoint.load(adapters[level])[0].eval()}, {},
        max_new_tokens=MAX_NEW, max_prompt=200, max_gap_drafts=limit,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["L4+VL", "X1+VL"])
def test_drafts_that_are_ready_are_the_first_of_all(
    name: str, pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    item, limit = items[0], 6
    visual = pool_visual(pair.verifier.visual_tokens(pair.verifier.pixels(item.media)))
    alone = local(pair, name, adapters, limit)
    party = StreamSpeculator(local(pair, name, adapters, limit), CPU)
    for speculator in (alone, party):
        speculator.start(item.media, item.sample.question, Stopwatch(CPU))
        if speculator.wants_projected:
            speculator.on_projected(visual)
    expected = alone.gap_drafts()
    # Until it has drafted all it may, or has said the end.
    assert party._thread is not None
    party._thread.join()
    assert party.gap_drafts() == expected
    assert expected.tokens
    assert {span.what for span in party.finish()} == {"prefill", "draft"}


def test_a_sample_may_end_before_the_drafter_has_begun(
    pair: ModelPair, items: list[BenchItem], adapters: dict[str, Path]
) -> None:
    party = StreamSpeculator(local(pair, "X1+VL", adapters, 4), CPU)
    # The verifier's visual tokens never come.
    party.start(items[0].media, items[0].sample.question, Stopwatch(CPU))
    assert party.gap_drafts().tokens == []
    assert [span.what for span in party.finish()] == ["prefill"]


class Broken(LocalSpeculator):
    # Where it always comes to, however late its thread is.
    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        raise ZeroDivisionError("of the drafter")


def test_what_fails_in_the_thread_is_raised_by_the_engine(
    pair: ModelPair, items: list[BenchItem]
) -> None:
    broken = Broken(
        parse("drafter+VL", 0), pair.drafter, VerifierTables.of(pair.verifier), {}, {},
        max_new_tokens=MAX_NEW, max_prompt=200, max_gap_drafts=4,
    )  # fmt: skip
    party = StreamSpeculator(broken, CPU)
    engine = Engine(pair.verifier, MAX_NEW, bench.longest_prompt(pair, items))
    media: Media = items[0].media
    with pytest.raises(ZeroDivisionError, match="of the drafter"):
        engine.speculate(media, items[0].sample.question, party, 0)
    # And the next sample begins afresh.
    with pytest.raises(ZeroDivisionError, match="of the drafter"):
        engine.speculate(media, items[0].sample.question, party, 0)

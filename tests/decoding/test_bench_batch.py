"""Batches against plain decoding of the same batches, and of their questions one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xsd import bench_batch
from xsd.bench import BenchItem, Failure
from xsd.bench_config import BenchConfig
from xsd.decoding.strategies import batchable, parse, parse_all
from xsd.errors import XsdError
from xsd.pairs.base import Decoder, Media, ModelPair
from xsd.scenes.questions import QUESTIONS
from xsd.types import Trace

CONFIG = BenchConfig(max_new_tokens=20, batch_size=3, repeats=2, warmup=1)
CONFIGS = "B1_decode,E1_decode,E3_decode,ngram,oracle,synthetic:0.7"


@pytest.fixture
def samples(items: list[BenchItem]) -> list[BenchItem]:
    """Four questions about one clip, one about another; clips come in turns."""
    first, second = items[:2]
    return [
        replace(item, sample=replace(item.sample, question_index=index, question=QUESTIONS[index]))
        for item, index in ((first, 0), (second, 3), (first, 1), (first, 5), (first, 8))
    ]


def keys(batches: Sequence[bench_batch.Batch]) -> list[list[str]]:
    return [[item.sample.key for item in batch] for batch in batches]


def test_a_batch_asks_about_one_clip_unless_nothing_is_shared(samples: list[BenchItem]) -> None:
    a, b = "r/000000", "r/000001"
    assert keys(bench_batch.group(samples, 3, share_visual=True)) == [
        [f"{a}/q0", f"{a}/q1", f"{a}/q5"],
        [f"{a}/q8"],
        [f"{b}/q3"],
    ]
    assert keys(bench_batch.group(samples, 3, share_visual=False)) == [
        [f"{a}/q0", f"{b}/q3", f"{a}/q1"],
        [f"{a}/q5", f"{a}/q8"],
    ]


def test_what_drafts_in_the_gap_with_the_drafter_or_in_trees_is_left_out() -> None:
    fit, left_out = batchable(parse_all("all", 4))
    names = [
        "vl_baseline",
        "vl_baseline:again",
        "B1_decode",
        "E1_decode",
        "E3_decode",
        "text",
        "ngram",
        "oracle",
    ]
    assert [strategy.name for strategy in fit] == names
    assert {"L4+VL", "template+VL", "E2_decode", "E1_tree", "X1+E3"} <= {s.name for s in left_out}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_every_config_says_what_each_question_gets_alone(
    pair: ModelPair,
    adapters: dict[str, Path],
    samples: list[BenchItem],
    share: bool,
) -> None:
    config = replace(CONFIG, share_visual=share)
    strategies, _ = batchable(parse_all(CONFIGS, 3))
    answers = [(question, (5, 6, 7)) for question in QUESTIONS]
    records = list(bench_batch.run(pair, samples, strategies, adapters, config, answers))
    assert len(records) == 2 * len(samples) * 7
    traces = [record for record in records if isinstance(record, Trace)]
    assert len(traces) == len(records), records[0]
    for trace in traces:
        assert trace.first_difference is None, trace.strategy
        assert trace.alone_ms is not None and trace.alone_ms > 0
    sizes = {trace.batch: trace.batch_size for trace in traces}
    batches = bench_batch.group(samples, 3, share_visual=share)
    assert sizes == {batch[0].sample.key: len(batch) for batch in batches}
    for name in (s.name for s in strategies):
        times = {(t.batch, t.repeat, t.total_ms) for t in traces if t.strategy == name}
        assert len(times) == 2 * len(batches), "one time a batch and repeat"
    oracle = [trace for trace in traces if trace.strategy == "oracle"]
    assert all(trace.cycle_accepted == trace.cycle_drafted for trace in oracle)


def test_a_batch_that_fails_counts_all_its_samples(
    pair: ModelPair,
    samples: list[BenchItem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strategies = [parse("vl_baseline", 0), parse("oracle", 3)]
    party = bench_batch.BatchBench(pair, samples, strategies, {}, CONFIG)
    batch = bench_batch.group(samples, 3, share_visual=True)[0]
    decode = party.decode

    def broken(batch: bench_batch.Batch, strategy: object) -> object:
        if strategy is strategies[1]:
            raise RuntimeError("out of memory\nand more")
        return decode(batch, strategies[0])

    monkeypatch.setattr(party, "decode", broken)
    records = list(party.batch(batch, 0))
    assert [type(record) for record in records] == [Trace] * 3 + [Failure] * 3
    failed = [record for record in records if isinstance(record, Failure)]
    assert {record.sample_key for record in failed} == {item.sample.key for item in batch}
    assert failed[0].reason == "RuntimeError: out of memory"


def test_a_batch_that_fails_before_its_turn_is_counted_in_its_turn(
    pair: ModelPair, samples: list[BenchItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = [samples[0].media]
    pixels = type(pair.verifier).pixels

    def broken(verifier: Decoder, media: Media) -> Any:
        if any(media is other for other in unseen):
            raise RuntimeError("made up\nand more")
        return pixels(verifier, media)

    monkeypatch.setattr(type(pair.verifier), "pixels", broken)
    given: Any = pair, samples, [parse("vl_baseline", 0), parse("oracle", 3)], {}, CONFIG
    records = list(bench_batch.run(*given))
    failed = {record for record in records if isinstance(record, Failure)}
    lost = [sample.sample.key for sample in samples if sample.media is unseen[0]]
    assert failed == {Failure(key, "vl_baseline", "RuntimeError: made up") for key in lost}
    traces = [record for record in records if isinstance(record, Trace)]
    assert {trace.sample_key for trace in traces} == {samples[1].sample.key} and len(traces) == 4
    unseen.append(samples[1].media)
    with pytest.raises(XsdError, match="no sample can be decoded; the first: Runtime"):
        list(bench_batch.run(*given))


def test_a_batch_is_timed_beside_plain_decoding_of_the_same_batch(
    pair: ModelPair, samples: list[BenchItem]
) -> None:
    strategies = [parse(name, 3) for name in ("vl_baseline", "oracle")]
    party = bench_batch.BatchBench(pair, samples, strategies, {}, CONFIG)
    batch = bench_batch.group(samples, 3, share_visual=True)[0]
    for record in party.batch(batch, 0):
        assert isinstance(record, Trace)
        assert record.beside["total_ms"] > record.beside["prefill_ms"] > 0


def test_what_batches_go_without() -> None:
    with pytest.raises(XsdError, match="batch_size=3 goes without last_chunk="):
        replace(CONFIG, last_chunk=8)
    replace(CONFIG, batch_size=1, last_chunk=8)

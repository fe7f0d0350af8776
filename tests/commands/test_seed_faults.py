"""The published pipeline's known faults, and the test that fails if one of them comes back.

==  =============================================================  ==============================
 1  states of different texts paired by position; ids not stored   tests/hidden/test_extract.py
                                                                   test_states_are_those_of_both_models
 2  scored at the position of a tensor that was read               tests/test_metrics.py
                                                                   test_copying_an_input_is_no_prediction
                                                                   tests/adapters/test_levels.py
                                                                   test_cannot_see_its_target
 3  test data select the weights                                   tests/commands/test_train.py
                                                                   test_test_data_may_validate_but_bars_promotion
    a validation of the last batch of each chunk                   below
 4  the maximum of two sequential timings as wall clock            below
 5  differing outputs are not counted                              tests/test_speedup.py
                                                                   test_lossless
                                                                   tests/decoding/test_engine.py
                                                                   test_every_config_is_lossless
 6  a pass of many rows taken to cost one step                     tests/test_speedup.py
                                                                   test_pass_between_measured_rows
                                                                   test_break_even_is_where_drafting_pays
 7  benchmark and extraction see other frames and prompts          tests/scenes/test_video.py
                                                                   test_sampling_spans_the_whole_clip
    their answers differ                                           below
 8  a baseline counts whose speculative run failed                 tests/test_speedup.py
                                                                   test_failed_sample_leaves_both_sides_and_is_counted
    exceptions are swallowed; the last chunk never lands           below
    an interruption loses answers; resuming reads all chunks       tests/hidden/test_resume.py
                                                                   test_a_death_at_every_touch_of_the_disk
                                                                   test_sigkill_at_random_moments
 9  event features pass the adaptor twice                          tests/pairs/test_eventgpt.py
                                                                   test_visual_tokens_pool_after_projector_and_adaptor
                                                                   tests/pairs/test_eventgpt_golden.py
                                                                   test_golden_inputs_embeds
10  a mean of ratios as the speedup                                tests/test_speedup.py
                                                                   test_pooled_ratio_is_sum_over_sum
==  =============================================================  ==============================
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import Float
from torch import Tensor

from tests.commands.conftest import World, xsd
from xsd import bench, metrics
from xsd.bench_config import BenchConfig
from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
from xsd.decoding.config import BASELINE, DecodingConfig
from xsd.decoding.engine import Engine
from xsd.decoding.strategies import parse
from xsd.errors import XsdError
from xsd.files import read_json
from xsd.hidden.store import HiddenStore
from xsd.pairs.base import Media, ModelPair
from xsd.pairs.catalog import load_pair
from xsd.types import Span, Trace

DECODING = DecodingConfig(max_new_tokens=8, overlap="inline")


@pytest.fixture
def pair(world: World) -> ModelPair:
    return load_pair(world.pair)


def items(world: World, pair: ModelPair) -> list[bench.BenchItem]:
    chosen = BenchConfig(max_samples=-1, max_questions=3, split="test")
    return bench.choose_items(world.scenes, chosen, pair)


def run(world: World, pair: ModelPair, *names: str) -> list[bench.Failure | Trace]:
    strategies = [parse(name, 2) for name in (BASELINE, *names)]
    given = world.pair, items(world, pair), strategies, {}, {}, DECODING
    return list(bench.run(pair, *given, repeats=1, warmup=0, timed=False))


def test_the_table_names_tests_that_exist() -> None:
    root, file = Path(__file__).parents[2], ""
    assert __doc__ is not None
    for word in re.findall(r"tests/\S+\.py|test_\w+", __doc__):
        if word.startswith("tests/"):
            file = (root / word).read_text(encoding="utf-8")
        else:
            assert f"def {word}(" in file, word


def test_3_every_answer_of_every_chunk_validates_and_is_scored(
    world: World, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8: nor is the last, shorter chunk lost."""
    asked = ["--max_questions", 3, "--max_new_tokens", 4, "--batch_clips", 1, "--chunk_size", 4]
    given = ["--dataset_dir", world.scenes, "--output_dir", "hidden"]
    xsd("extract", *world.pair_flags, *given, *asked)
    stores = [HiddenStore.open(folder) for folder in sorted(Path("hidden").iterdir())]
    assert [(len(store), len(store.keys_by_chunk())) for store in stores] == [(6, 2), (18, 6)]
    counted: list[int] = []
    original = metrics.score_chain

    def score_chain(*args: Any) -> metrics.Scored:
        scored = original(*args)
        counted.append(scored.counts.target.num_samples)
        return scored

    monkeypatch.setattr(metrics, "score_chain", score_chain)
    words = ["--data", "hidden", "--batch_size", 4, "--output_dir"]
    xsd("train", *world.train_flags, *words, "trained")
    found = [sum(counted[:2]), sum(counted[2:])]
    assert found == [6, 6], "both epochs validate on all answers of the val recordings"
    [checkpoint] = Path("trained/L1").iterdir()
    flags = ["--checkpoint", checkpoint, "--lm_head", world.head]
    xsd("evaluate", *world.pair_flags, *flags, *words, "evaluated")
    assert read_json(Path("evaluated/acceptance_metrics.json"))["num_samples"] == 6


class Slow:
    """A drafter that takes its time before the verifier may begin."""

    wants_projected = wants_prefilled = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        time.sleep(self.seconds)

    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None: ...
    def gap_drafts(self) -> Draft:
        return Draft([])

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        return Draft([])

    def finish(self) -> list[Span]:
        return []


def test_4_what_runs_one_after_the_other_is_measured_as_a_sum(
    world: World, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, seconds = items(world, pair)[0], 0.15
    original = type(pair.verifier).pixels

    def pixels(decoder: Any, media: Media) -> Float[Tensor, "N 3 H W"]:
        time.sleep(seconds)
        return original(decoder, media)

    engine = Engine(pair.verifier, 8, bench.longest_prompt(pair, [item]))
    monkeypatch.setattr(type(pair.verifier), "pixels", pixels)
    decoded = engine.speculate(item.media, item.sample.question, Slow(seconds), 2)
    assert decoded.total_ms >= decoded.prefill_ms >= 2 * seconds * 1e3
    assert engine.plain(item.media, item.sample.question).prefill_ms >= seconds * 1e3


def test_7_the_benchmark_says_what_extraction_stored(world: World, pair: ModelPair) -> None:
    store = HiddenStore.open(world.data / "chunked_test_1s_fp32")
    said = {t.sample_key: t.token_ids for t in run(world, pair) if isinstance(t, Trace)}
    assert said == {sample.key: tuple(sample.verifier_ids.tolist()) for sample in store}


def test_8_what_fails_is_a_record_and_too_many_fail_the_stage(
    world: World, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = Engine.speculate, iter(range(100))

    def speculate(engine: Engine, *args: Any) -> Any:
        if next(count) == 1:
            raise RuntimeError("out of memory")
        return original(engine, *args)

    monkeypatch.setattr(Engine, "speculate", speculate)
    records = run(world, pair, "drafter+VL")
    [failure] = [record for record in records if isinstance(record, bench.Failure)]
    assert failure.strategy == "drafter+VL" and failure.reason == "RuntimeError: out of memory"
    assert len(records) == 12
    assert bench.check_failures(records, 6, 0.2) == records
    told = rf"drafter\+VL lost 1 of 6 samples, .*; the first \({failure.sample_key}, .*: Runtime"
    with pytest.raises(XsdError, match=told):
        bench.check_failures(records, 6, 0.1)

    # What plain decoding loses every config loses, and a sample is lost once.
    one = records[0]
    assert isinstance(one, Trace)
    lost = [bench.Failure(key, BASELINE, "no video") for key in ("a", "b", "b")]
    mixed = [*(replace(one, sample_key=str(n)) for n in range(200)), *lost, failure]
    told = r"^drafter\+VL lost 3 of 6 samples, .* --max_failures 0.4 allows; the first \(a, vl_bas"
    with pytest.raises(XsdError, match=told):
        bench.check_failures(mixed, 6, 0.4)
    with pytest.raises(XsdError, match=r"^vl_baseline lost 2 of 6 samples, .*: no video$"):
        bench.check_failures(mixed[:-1], 6, 0.2)
    assert bench.check_failures(mixed, 6, 0.5) == mixed

    def defect(engine: Engine, *args: Any) -> Any:
        raise ZeroDivisionError

    # A defect is no failed sample: it is not caught.
    monkeypatch.setattr(Engine, "speculate", defect)
    with pytest.raises(ZeroDivisionError):
        run(world, pair, "drafter+VL")

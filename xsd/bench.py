"""Room 8: samples x strategies -> traces, measured side by side.

Every sample is decoded plainly and by every strategy within one pass, again and again, so that
whatever the machine does meanwhile touches both sides of a ratio.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import torch

from xsd.adapters import checkpoint
from xsd.adapters.base import Adapter
from xsd.bench_config import BenchConfig
from xsd.bench_turns import UNFIT, Turn, beside_plain
from xsd.clock import Stopwatch
from xsd.decoding.accept import Sampling
from xsd.decoding.config import BASELINE, DecodingConfig
from xsd.decoding.controls import (
    Known,
    NGramHead,
    OracleHead,
    commonest_answers,
)
from xsd.decoding.costs import Costs
from xsd.decoding.decoded import Decoded
from xsd.decoding.draft import Head, HeadOptions
from xsd.decoding.engine import Engine
from xsd.decoding.graphs import head_drafter
from xsd.decoding.measure import measure_drafting, measure_passes
from xsd.decoding.near_tie import is_near_tie
from xsd.decoding.overlap import DrafterProcess, ProcessSpeculator, WorkerSetup
from xsd.decoding.policy import Adaptive, Policy, Way
from xsd.decoding.speculator import LocalSpeculator, Speculator
from xsd.decoding.strategies import (
    acceptance_rates,
    adapter_names,
    goes_on,
    needs_drafter,
    strict_rows,
)
from xsd.decoding.streams import StreamSpeculator
from xsd.decoding.tables import VerifierTables
from xsd.errors import XsdError, reason
from xsd.hidden.media import read_media
from xsd.hidden.store import HiddenStore
from xsd.pairs.base import Decoder, Media, ModelPair
from xsd.pairs.config import PairConfig
from xsd.scenes.dsec import load_index, samples
from xsd.scenes.questions import QUESTIONS
from xsd.types import Sample, Strategy, Trace

T = TypeVar("T")
R = TypeVar("R")

NUM_MEASURED = 3
"""Items that what is measured beforehand is measured with."""


@dataclass(frozen=True)
class BenchItem:
    """A sample with its media decoded into host memory, where the clock starts."""

    sample: Sample
    media: Media
    media_ms: float
    """Decoding the files: outside the clock, the same for all strategies."""
    other_events: Media
    """The same frames with another scene's events (control ``shuffled_events``)."""


@dataclass(frozen=True)
class Failure:
    """A sample that one strategy could not decode: excluded from both sides, and counted.

    Where plain decoding fails, its own failure stands for all strategies'.
    """

    sample_key: str
    strategy: str
    reason: str


def run(
    pair: ModelPair,
    pair_config: PairConfig,
    items: Sequence[BenchItem],
    strategies: Sequence[Strategy],
    adapters: Mapping[str, Path],
    templates: Mapping[str, Sequence[int]],
    config: DecodingConfig,
    *,
    repeats: int,
    warmup: int,
    timed: bool = True,
    answers: Iterable[tuple[str, Sequence[int]]] = (),
) -> Iterator[Trace | Failure]:
    """Decode every item by every strategy, ``repeats`` times, interleaved.

    Args:
        timed: false: only what is said matters, so nothing is prepared for a fair clock, and the
            policy is the fixed one.
        answers: ``(question, ids)`` of the training split, for the control ``ngram``.

    The first strategy is the baseline: its answer is what every other answer is compared with.

    Raises:
        XsdError: a strategy's adapter is missing or does not fit the pair, or no item can be
            decoded.
    """
    with ExitStack() as stack:
        bench = Bench(
            stack, pair, pair_config, items, strategies, adapters, templates, config, answers
        )
        if config.strict:
            print(f"benchmark: strict, every pass of decoding has {bench.strict_rows} rows")
        if timed:
            print(bench.choose_cores())
            bench.measure_costs()
        for item in items[:warmup]:
            for strategy in strategies:
                with suppress(*UNFIT):  # it is counted when its turn comes
                    bench.decode(item, strategy)
        for repeat in range(repeats):
            for item in items:
                yield from bench.sample(item, repeat)


class Bench:
    """The engine, and the drafting party of every strategy, ready for the items' prompts."""

    def __init__(
        self,
        stack: ExitStack,
        pair: ModelPair,
        pair_config: PairConfig,
        items: Sequence[BenchItem],
        strategies: Sequence[Strategy],
        adapters: Mapping[str, Path],
        templates: Mapping[str, Sequence[int]],
        config: DecodingConfig,
        answers: Iterable[tuple[str, Sequence[int]]] = (),
    ) -> None:
        self.pair, self.strategies = pair, strategies
        config = self.config = replace(config, overlap=_overlap(config, pair.drafter.stack.device))
        self.items = list(items)
        self._templates, self._answers = templates, list(answers)
        self._max_prompt = longest_prompt(pair, items)
        self._sampling = sampling_of(config)
        self.strict_rows = strict_rows(strategies, config)
        if config.strict and pair.quant == "8bit":
            raise XsdError(
                "strict: 8-bit layers keep a column precise if any row of the pass is large there, "
                "so no row shape makes a token's numbers its own; say --quant 4bit or bf16"
            )
        self.engine = Engine(
            pair.verifier,
            config.max_new_tokens,
            self._max_prompt,
            sampling=self._sampling,
            seed=config.seed,
            last_chunk=config.last_chunk,
            strict_rows=self.strict_rows,
        )
        loaded = self._adapters = load_adapters(pair, strategies, adapters)
        self._known = Known()
        self._costs: Costs | None = None
        self._drafting: dict[str, tuple[float, float]] = {}
        """By strategy: milliseconds of a draft's first level and of each further one."""
        self.process: DrafterProcess | None = None
        if config.overlap == "process" and any(needs_drafter(s) for s in strategies):
            in_gap = {name for s in strategies for name in adapter_names(replace(s, head=None))}
            media = [seen for item in items for seen in (item.media, item.other_events)]
            setup = WorkerSetup(
                pair_config,
                {name: adapters[name] for name in loaded if name in in_gap},
                config,
                self._max_prompt,
                image_bytes=max(sum(i.nbytes for i in seen.event_images) for seen in media),
                num_threads=1,
            )
            process = DrafterProcess(setup, pair.drafter, pair.verifier)
            self.process = stack.enter_context(process)
        self._tables = VerifierTables.of(pair.verifier)
        self._prepare(None)

    def _prepare(self, costs: Costs | None) -> None:
        """Every strategy's policy and drafting party; without costs nothing can be decided."""
        self.policies = {
            strategy.name: self._policy(strategy, costs) for strategy in self.strategies
        }
        self.speculators = {s.name: self._speculator(s) for s in self.strategies}
        self._ways = {s.name: self._ways_of(s) for s in self.strategies}

    def _policy(self, strategy: Strategy, costs: Costs | None) -> Policy:
        if costs is None or self.config.policy == "fixed":
            return Policy()
        is_beside = strategy.gap is not None or needs_drafter(strategy)
        # What leaves the compiled loop (an n-gram's look-ups; on a GPU all drafting) costs the host
        # time that is in no costs either.
        is_outside = strategy.head == "ngram" or not self.engine.is_compiled
        return Adaptive(costs, is_timed=is_beside or is_outside)

    def _ways_of(self, strategy: Strategy) -> dict[Way, Speculator | None]:
        """Who drafts where a policy makes use of nothing of a strategy, a part, or all of it."""
        ways: dict[Way, Speculator | None] = {"plain": None}
        if strategy.gap is not None and strategy.head is not None and not goes_on(strategy):
            head_alone = replace(strategy, gap=None)
            if not needs_drafter(head_alone):
                ways = {"head": self._speculator(head_alone)}
        return {**ways, "all": self.speculators[strategy.name]}

    def _speculator(self, strategy: Strategy) -> Speculator | None:
        if strategy.gap is None and strategy.head is None:
            return None
        head = self._head(strategy)
        if self.process is not None and needs_drafter(strategy):
            return ProcessSpeculator(strategy, self.process, head)
        local = LocalSpeculator(
            strategy,
            self.pair.drafter,
            self._tables,
            self._adapters,
            self._templates,
            max_new_tokens=self.config.max_new_tokens,
            max_prompt=self._max_prompt,
            max_gap_drafts=self.config.max_gap_drafts,
            head=head,
        )
        if self.config.overlap == "stream" and needs_drafter(strategy):
            return StreamSpeculator(local, self.pair.drafter.stack.device)
        return local

    def _head(self, strategy: Strategy) -> Head | None:
        if strategy.head is None or goes_on(strategy):
            return None
        kind, _, rates = strategy.head.partition(":")
        if kind == "ngram":
            return NGramHead(self._prompt_ids, self._answers)
        if kind in ("oracle", "synthetic"):
            chances = acceptance_rates(rates or "1")
            seed, vocab = self.config.seed, self.pair.verifier.vocab_size
            return OracleHead(self._known, chances, vocab, seed)
        options = HeadOptions(
            tree_width=self.config.tree_width if strategy.tree else 0,
            tree_nodes=self.config.tree_nodes,
            sampling=self._sampling,
            draws=None if self._sampling is None else self.engine.draft_draws,
        )
        adapter, policy = self._adapters[strategy.head], self.policies[strategy.name]
        return head_drafter(adapter, self._tables, self.config.max_new_tokens, options, policy)

    def _prompt_ids(self, question: str) -> Sequence[int]:
        prompt = self.engine.prompt(question)
        return (*prompt.before, *prompt.after)

    @cached_property
    def _fit(self) -> list[BenchItem]:
        """Items to measure with."""
        plain = partial(self.decode, strategy=self.strategies[0])
        return [item for item, _ in islice(decodable(self.items, plain), NUM_MEASURED)]

    def measure_costs(self) -> None:
        """What the verifier's passes and drafts cost at this moment: policies decide by it, and
        answers are modelled from it.

        Raises:
            XsdError: no item can be decoded.
        """
        item = self._fit[0]
        self._costs = measure_passes(self.engine, item.media, item.sample.question)
        self._prepare(self._costs)
        for strategy in self.strategies:
            party = self.speculators[strategy.name]
            if party is not None and (found := self._drafting_ms(party, strategy.gamma)):
                self._drafting[strategy.name] = found
                self.policies[strategy.name].learn_drafting(*found)

    def _drafting_ms(self, party: Speculator, gamma: int) -> tuple[float, float] | None:
        for item in self._fit:
            with suppress(*UNFIT):  # it is counted when its turn comes
                asked = item.media, item.sample.question
                return measure_drafting(self.engine, *asked, party, gamma)
        return None

    def choose_cores(self) -> str:
        """``fastest_cores`` for plain answers.

        Raises:
            XsdError: no item can be decoded.
        """
        return fastest_cores(
            self.pair.verifier,
            lambda item: self.engine.plain(item.media, item.sample.question).total_ms,
            self._fit,
        )

    def decode(self, item: BenchItem, strategy: Strategy) -> Decoded:
        """One answer by a strategy, or by as much of it as its policy makes use of."""
        speculator = self.speculators[strategy.name]
        question = item.sample.question
        self.engine.name_draws(draws_of(item, strategy))
        if speculator is None:
            plain = self.engine.plain(item.media, question)
            self._known.answer = plain.token_ids
            return plain
        media = item.other_events if strategy.shuffled_events else item.media
        policy, ways = self.policies[strategy.name], self._ways[strategy.name]
        way = policy.way(list(ways))
        if (party := ways[way]) is None:
            decoded = self.engine.plain(media, question)
        else:
            decoded = self.engine.speculate(media, question, party, strategy.gamma, policy)
        policy.learn_answer(way, decoded)
        return decoded

    def sample(self, item: BenchItem, repeat: int) -> Iterator[Trace | Failure]:
        """Every strategy on one item, held to what plain decoding said before the clock ran, and
        timed beside plain decoding (``beside_plain``)."""
        try:
            plain = self.decode(item, self.strategies[0]).token_ids
            seed = f"{item.sample.key} {repeat}"
            turns = list(beside_plain(self.strategies, lambda s: [self.decode(item, s)], seed))
        except UNFIT as error:
            yield _failure(item, self.strategies[0], error)
            return
        for turn in turns:
            if isinstance(turn.decoded, Exception):
                yield _failure(item, turn.strategy, turn.decoded)
            else:
                yield self._trace(item, turn, repeat, turn.decoded[0], plain)

    def _trace(
        self, item: BenchItem, turn: Turn, repeat: int, decoded: Decoded, plain: list[int]
    ) -> Trace:
        strategy = turn.strategy
        # What is drawn agrees in distribution, not token by token.
        is_drawn = self._sampling is not None
        differs = None if is_drawn else first_difference(decoded.token_ids, plain)
        return Trace(
            sample_key=item.sample.key,
            strategy=strategy.name,
            repeat=repeat,
            question=item.sample.question,
            token_ids=tuple(decoded.token_ids),
            text=self.pair.verifier.decode_text(decoded.token_ids),
            prefill_ms=decoded.prefill_ms,
            decode_ms=decoded.decode_ms,
            total_ms=decoded.total_ms,
            num_free=decoded.num_free,
            gap_drafted=decoded.gap_drafted,
            gap_accepted=decoded.gap_accepted,
            cycle_drafted=tuple(decoded.cycle_drafted),
            cycle_accepted=tuple(decoded.cycle_accepted),
            first_difference=differs,
            near_tie=differs is not None
            and not self.config.strict
            and is_near_tie(
                self.pair.verifier,
                item.media,
                item.sample.question,
                plain,
                differs,
                {decoded.gap_drafted, *(drafted + 1 for drafted in decoded.cycle_drafted)} - {0},
            ),
            timeline=tuple(decoded.timeline),
            parts=dict(decoded.parts),
            beside=turn.beside,
            modelled_ms=self._modelled_ms(strategy, decoded),
        )

    def _modelled_ms(self, strategy: Strategy, decoded: Decoded) -> float | None:
        if self._costs is None:
            return None
        drafting = self._drafting.get(strategy.name)
        if drafting is None:
            # Not compiled: the policy has followed what it takes.
            drafting = self.policies[strategy.name].drafting_ms
        if drafting is None:
            return None if decoded.cycle_drafted else self._costs.answer_ms(decoded, 0.0, 0.0, 1)
        return self._costs.answer_ms(decoded, *drafting, strategy.gamma)


def _failure(item: BenchItem, strategy: Strategy, error: Exception) -> Failure:
    return Failure(item.sample.key, strategy.name, reason(error))


def decodable(work: Iterable[T], decode: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """What can be decoded, and as what; the rest counts as failed when its turn comes.

    Raises:
        XsdError: nothing can be.
    """
    failures: list[Exception] = []
    num_decoded = 0
    for item in work:
        try:
            result = decode(item)
        except UNFIT as error:
            failures.append(error)
        else:
            num_decoded += 1
            yield item, result
    if not num_decoded:
        raise XsdError(f"no sample can be decoded; the first: {reason(failures[0])}")


def choose_items(scenes: Path, config: BenchConfig, pair: ModelPair) -> list[BenchItem]:
    """Samples of a split, drawn over clips and questions alike, with their media decoded.

    Questions that share their clip in a batch are drawn together.

    Raises:
        XsdError: the split is empty, or a file cannot be read.
    """
    found = list(samples(load_index(scenes, split=config.split), config.max_questions))
    if not found:
        raise XsdError(f"{scenes}: no scene of split {config.split!r}; choose another --split")
    if 0 < config.max_samples < len(found):
        size = config.batch_size if config.share_visual else 1
        units = grouped(found, size, lambda sample: sample.scene.key)
        num_units = max(1, config.max_samples // size)
        chosen = random.Random(0).sample(range(len(units)), num_units)
        found = [sample for index in sorted(chosen) for sample in units[index]]
    return load_items(found, pair.num_event_images, pair.num_frames)


def grouped(things: Sequence[T], size: int, clip: Callable[[T], str]) -> list[list[T]]:
    """At most ``size`` things of one clip at a time; clips and their things in order."""
    by_clip: dict[str, list[T]] = {}
    for thing in things:
        by_clip.setdefault(clip(thing), []).append(thing)
    return [
        found[start : start + size]
        for found in by_clip.values()
        for start in range(0, len(found), size)
    ]


def fastest_cores(verifier: Decoder, plain_ms: Callable[[T], float], work: Sequence[T]) -> str:
    """Give the verifier the number of cores that decodes plainly the fastest; what was found.

    Both sides of every ratio then run with it. Small models are often faster on one core.
    """
    found: dict[int, list[float]] = {n: [] for n in sorted({1, os.cpu_count() or 1})}
    # In turns, so that whatever the machine does meanwhile touches all of them alike.
    for _ in range(5):
        for num_cores, seen in found.items():
            verifier.use_cores(num_cores)
            plain_ms(work[0])
            seen += [plain_ms(item) for item in work]
    times = {num_cores: statistics.median(seen) for num_cores, seen in found.items()}
    fastest = min(times, key=lambda n: times[n])
    verifier.use_cores(fastest)
    told = ", ".join(f"{n}: {ms:.1f} ms" for n, ms in times.items())
    return f"benchmark: {fastest} core(s) for the verifier (plain decoding by cores: {told})"


def check_failures(
    records: Iterable[Trace | Failure], num_samples: int, max_share: float
) -> list[Trace | Failure]:
    """Collect a benchmark's records.

    A config has lost a sample if it, or plain decoding, failed there in any repeat.

    Raises:
        XsdError: some config lost more than ``max_share`` of ``num_samples``; told is the one that
            lost the most.
    """
    found = list(records)
    failures = [record for record in found if isinstance(record, Failure)]
    # What plain decoding lost all have lost, so of equals it is the one to tell of.
    names = dict.fromkeys((BASELINE, *(failure.strategy for failure in failures)))
    by_config = {
        name: [failure for failure in failures if failure.strategy in (name, BASELINE)]
        for name in names
    }
    lost = {name: len({f.sample_key for f in own}) for name, own in by_config.items()}
    worst = max(lost, key=lambda name: lost[name])
    if lost[worst] > max_share * num_samples:
        first = by_config[worst][0]
        raise XsdError(
            f"{worst} lost {lost[worst]} of {num_samples} samples, more than --max_failures "
            f"{max_share} allows; the first ({first.sample_key}, {first.strategy}): {first.reason}"
        )
    return found


def load_items(
    samples: Sequence[Sample], num_event_images: int, num_frames: int
) -> list[BenchItem]:
    """Decode every sample's media; events are shuffled by one clip's distance."""
    media: dict[str, tuple[Media, float]] = {}
    for scene in {sample.scene.key: sample.scene for sample in samples}.values():
        watch = Stopwatch(torch.device("cpu"))
        found = read_media(scene, num_event_images, num_frames)
        media[scene.key] = (found, watch.ms())
    keys = list(media)
    other = dict(zip(keys, keys[1:] + keys[:1], strict=True))
    return [
        BenchItem(
            sample,
            *media[sample.scene.key],
            Media(
                media[other[sample.scene.key]][0].event_images, media[sample.scene.key][0].frames
            ),
        )
        for sample in samples
    ]


def templates(store: HiddenStore) -> dict[str, tuple[int, ...]]:
    """The training split's commonest answer to every question (control ``template``)."""
    return commonest_answers(training_answers(store))


def training_answers(store: HiddenStore) -> Iterator[tuple[str, list[int]]]:
    """``(question, ids)`` of the training split."""
    for key in store.keys("train"):
        question = QUESTIONS[int(key.rpartition("/q")[2])]
        yield question, store.sample(key).verifier_ids.tolist()


def first_difference(ids: Sequence[int], plain: Sequence[int]) -> int | None:
    """First position at which two answers differ (an end is a difference); None when equal."""
    for index, (left, right) in enumerate(zip(ids, plain, strict=False)):
        if left != right:
            return index
    return None if len(ids) == len(plain) else min(len(ids), len(plain))


def draws_of(item: BenchItem, strategy: Strategy) -> str:
    """Name of the random numbers: an answer's own, and no other's than this strategy's, for some
    drafts (``oracle``) are what plain decoding drew."""
    return f"{item.sample.key} {strategy.name}"


def _overlap(
    config: DecodingConfig, device: torch.device
) -> Literal["process", "stream", "inline"]:
    """How a drafter on ``device`` and the verifier's prefill overlap.

    Raises:
        XsdError: as configured they cannot.
    """
    is_on_gpu = device.type == "cuda"
    if config.overlap == "auto":
        return "stream" if is_on_gpu else "process"
    if config.overlap == "process" and is_on_gpu:
        raise XsdError(
            "overlap=process: its memory is the host's, and this drafter is on a GPU; say stream"
        )
    return config.overlap


def sampling_of(config: DecodingConfig) -> Sampling | None:
    """How tokens are drawn; None: they are the likeliest."""
    return None if config.temperature == 0 else Sampling(config.temperature, config.top_p)


def longest_prompt(pair: ModelPair, items: Sequence[BenchItem]) -> int:
    """Cache positions that the longest prompt of either model takes.

    Raises:
        XsdError: there is no item that a model can see.
    """
    longest = 0
    for decoder in (pair.drafter, pair.verifier):
        _, visual = next(decodable(items, partial(_num_visual, decoder)))
        for question in {item.sample.question for item in items}:
            prompt = decoder.prompt(question)
            longest = max(longest, len(prompt.before) + visual + len(prompt.after))
    return longest


def _num_visual(decoder: Decoder, item: BenchItem) -> int:
    return len(decoder.visual_tokens(decoder.pixels(item.media)))


def load_adapters(
    pair: ModelPair, strategies: Sequence[Strategy], adapters: Mapping[str, Path]
) -> dict[str, Adapter]:
    """Load what the strategies name and check that it fits the pair.

    Raises:
        XsdError: an adapter is missing, of another level, of other widths, or not deployable.
    """
    loaded: dict[str, Adapter] = {}
    gaps = {strategy.gap for strategy in strategies}
    for name in dict.fromkeys(n for strategy in strategies for n in adapter_names(strategy)):
        if name not in adapters:
            raise XsdError(f"no adapter for {name}; train and promote it, or name its folder")
        adapter, _ = checkpoint.load(
            adapters[name],
            expect_level=name.partition(":")[0],
            expect_widths=(pair.drafter.width, pair.verifier.width),
        )
        partner = pair.drafter if name.partition(":")[0] in gaps else pair.verifier
        loaded[name] = adapter.to(partner.stack.device).eval()
    return loaded


@torch.inference_mode()
def is_lossless(
    pair: ModelPair,
    pair_config: PairConfig,
    items: Sequence[BenchItem],
    strategy: Strategy,
    adapter: Path,
) -> bool:
    """Whether a short decode with one adapter says exactly what plain decoding says."""
    config = replace(DecodingConfig(), overlap="inline")
    (name,) = adapter_names(strategy)
    baseline = Strategy("vl_baseline")
    records = run(
        pair, pair_config, items, [baseline, strategy], {name: adapter}, {}, config,
        repeats=1, warmup=0, timed=False,
    )  # fmt: skip
    return all(isinstance(record, Trace) and record.lossless for record in records)

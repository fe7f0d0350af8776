"""Room 8 for batches: several answers at once against plain decoding of the same batch.

What a batch takes has no share that would be a sample's own, so every trace carries the times of
its whole batch, and sums are over batches (``speedup.measured``). Beside each batch its questions
are also decoded plainly one by one: the answers that all others are held to, and the time that says
what batching itself is worth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from xsd.bench import (
    NUM_MEASURED,
    BenchItem,
    Failure,
    decodable,
    draws_of,
    fastest_cores,
    first_difference,
    grouped,
    load_adapters,
    longest_prompt,
    sampling_of,
)
from xsd.bench_config import BenchConfig
from xsd.bench_turns import UNFIT, Turn, beside_plain
from xsd.decoding.batch import AdapterRows, BatchEngine, BatchHead, SeparateRows
from xsd.decoding.controls import Known, NGramHead, OracleHead
from xsd.decoding.decoded import Decoded
from xsd.decoding.draft import Head
from xsd.decoding.near_tie import is_near_tie
from xsd.decoding.strategies import acceptance_rates
from xsd.decoding.tables import VerifierTables
from xsd.errors import reason
from xsd.pairs.base import ModelPair
from xsd.types import Strategy, Trace

Batch = Sequence[BenchItem]


def run(
    pair: ModelPair,
    items: Sequence[BenchItem],
    strategies: Sequence[Strategy],
    adapters: Mapping[str, Path],
    config: BenchConfig,
    answers: Iterable[tuple[str, Sequence[int]]] = (),
) -> Iterator[Trace | Failure]:
    """Decode every batch alone and by every strategy, ``config.repeats`` times, interleaved.

    Args:
        strategies: the plain baseline, then such as ``strategies.batchable`` lets through.
        answers: ``(question, ids)`` of the training split, for the control ``ngram``.

    Raises:
        XsdError: a strategy's adapter is missing or does not fit the pair, or no batch can be
            decoded.
    """
    bench = BatchBench(pair, items, strategies, adapters, config, answers)
    batches = group(items, config.batch_size, share_visual=config.share_visual)
    plain_ms = lambda batch: bench.decode(batch, strategies[0])[0].total_ms  # noqa: E731
    fit = [batch for batch, _ in islice(decodable(batches, plain_ms), NUM_MEASURED)]
    print(fastest_cores(pair.verifier, plain_ms, fit))
    for batch in batches[: -(-config.warmup // config.batch_size)]:
        list(bench.batch(batch, 0))
    for repeat in range(config.repeats):
        for batch in batches:
            yield from bench.batch(batch, repeat)


def group(items: Sequence[BenchItem], size: int, *, share_visual: bool) -> list[list[BenchItem]]:
    """Batches of at most ``size``, in order; with ``share_visual`` each of one clip."""
    return grouped(items, size, lambda item: item.sample.scene.key if share_visual else "")


class BatchBench:
    """The engine, and a head for every strategy, ready for the items' prompts."""

    def __init__(
        self,
        pair: ModelPair,
        items: Sequence[BenchItem],
        strategies: Sequence[Strategy],
        adapters: Mapping[str, Path],
        config: BenchConfig,
        answers: Iterable[tuple[str, Sequence[int]]] = (),
    ) -> None:
        self.pair, self.config, self.strategies = pair, config, strategies
        self.engine = BatchEngine(
            pair.verifier,
            config.max_new_tokens,
            longest_prompt(pair, items),
            config.batch_size,
            share_visual=config.share_visual,
            sampling=sampling_of(config),
            seed=config.seed,
        )
        self._answers = list(answers)
        self._adapters = load_adapters(pair, strategies, adapters)
        self._known = [Known() for _ in range(config.batch_size)]
        self._heads = {strategy.name: self._head(strategy) for strategy in strategies}

    def _head(self, strategy: Strategy) -> BatchHead | None:
        name, verifier = strategy.head, self.pair.verifier
        if name is None:
            return None
        if name in self._adapters:
            tables = VerifierTables.of(verifier)
            config = self.config
            return AdapterRows(
                self._adapters[name],
                tables,
                config.max_new_tokens,
                sampling_of(config),
                config.seed,
            )
        heads: list[Head]
        kind, _, rates = name.partition(":")
        if kind == "ngram":
            ngram = NGramHead(self._prompt_ids, self._answers)
            heads = [copy.copy(ngram) for _ in self._known]
        else:
            chances = acceptance_rates(rates or "1")
            heads = [
                OracleHead(known, chances, verifier.vocab_size, self.config.seed + row)
                for row, known in enumerate(self._known)
            ]
        return SeparateRows(heads.__getitem__, verifier.stack.device)

    def _prompt_ids(self, question: str) -> Sequence[int]:
        prompt = self.pair.verifier.prompt(question)
        return (*prompt.before, *prompt.after)

    def decode(self, batch: Batch, strategy: Strategy) -> list[Decoded]:
        """Answers to a batch; their times are the batch's."""
        return self.engine.decode_batch(
            [item.media for item in batch],
            [item.sample.question for item in batch],
            self._heads[strategy.name],
            strategy.gamma,
            [draws_of(item, strategy) for item in batch],
        )

    def _alone(self, item: BenchItem) -> Decoded:
        self.engine.name_draws(f"{item.sample.key} alone")
        return self.engine.plain(item.media, item.sample.question)

    def batch(self, batch: Batch, repeat: int) -> Iterator[Trace | Failure]:
        """One by one, then every strategy beside plain decoding of the same batch; a batch fails as
        a whole."""
        try:
            alone = [self._alone(item) for item in batch]
            for known, plain in zip(self._known, alone, strict=False):
                known.answer = plain.token_ids
            seed = f"{batch[0].sample.key} {repeat}"
            turns = list(beside_plain(self.strategies, lambda s: self.decode(batch, s), seed))
        except UNFIT as error:
            yield from _failures(batch, self.strategies[0], error)
            return
        for turn in turns:
            if isinstance(turn.decoded, Exception):
                yield from _failures(batch, turn.strategy, turn.decoded)
                continue
            for item, answer, plain in zip(batch, turn.decoded, alone, strict=True):
                yield self._trace(batch, item, turn, repeat, answer, plain)

    def _trace(
        self,
        batch: Batch,
        item: BenchItem,
        turn: Turn,
        repeat: int,
        decoded: Decoded,
        plain: Decoded,
    ) -> Trace:
        verifier = self.pair.verifier
        # What is drawn agrees in distribution, not token by token.
        is_drawn = self.config.temperature > 0
        differs = None if is_drawn else first_difference(decoded.token_ids, plain.token_ids)
        # What rounds is a product over the rows of a pass, whichever answer each belongs to.
        sizes = {len(batch) * (1 + drafted) for drafted in (0, *decoded.cycle_drafted)}
        return Trace(
            sample_key=item.sample.key,
            strategy=turn.strategy.name,
            repeat=repeat,
            question=item.sample.question,
            token_ids=tuple(decoded.token_ids),
            text=verifier.decode_text(decoded.token_ids),
            prefill_ms=decoded.prefill_ms,
            decode_ms=decoded.decode_ms,
            total_ms=decoded.total_ms,
            num_free=0,
            gap_drafted=0,
            gap_accepted=0,
            cycle_drafted=tuple(decoded.cycle_drafted),
            cycle_accepted=tuple(decoded.cycle_accepted),
            first_difference=differs,
            near_tie=differs is not None
            and is_near_tie(
                verifier, item.media, item.sample.question, plain.token_ids, differs, sizes
            ),
            timeline=tuple(decoded.timeline),
            batch=batch[0].sample.key,
            batch_size=len(batch),
            alone_ms=plain.total_ms,
            beside=turn.beside,
        )


def _failures(batch: Batch, strategy: Strategy, error: Exception) -> Iterator[Failure]:
    for item in batch:
        yield Failure(item.sample.key, strategy.name, reason(error))

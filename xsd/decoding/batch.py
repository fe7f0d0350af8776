"""Plain and speculative decoding of several answers at once, on one cache.

Every answer is the one that plain decoding says alone, drawn or not: a pass carries the last token
and the drafts of all rows, each row accepts as many as hold, and the cache closes the gaps that the
others leave (``KVCache.keep_each``). The questions of one clip share everything up to its visual
tokens: that prefix is read once and lent to all rows, for plain and speculative decoding alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.rows import Ragged, StepInputs
from xsd.clock import Stopwatch
from xsd.decoding.accept import NOTHING, Draft, Sampling, choose_sampled, draw, verify
from xsd.decoding.config import MAX_GAMMA
from xsd.decoding.decoded import Decoded
from xsd.decoding.draft import Head
from xsd.decoding.draws import Draws
from xsd.decoding.engine import Engine
from xsd.decoding.tables import VerifierTables
from xsd.errors import XsdError
from xsd.hidden.visual import pool_visual
from xsd.pairs.base import Decoder, Media, Prompt
from xsd.pairs.cache import KVCache
from xsd.pairs.device import to_device
from xsd.pairs.generate import prefill
from xsd.types import Span


class Proposed(NamedTuple):
    """Drafts of all rows of a batch."""

    ids: Int[Tensor, "B n"]
    """``NOTHING`` at the end, where a row has fewer; only of such as were chosen."""
    q: Float[Tensor, "B n V"] | None = None
    """What each was drawn from; None: they were chosen."""


@runtime_checkable
class BatchHead(Protocol):
    """Drafts in decode, for all rows of a batch."""

    wants_prefilled: bool
    """Whether ``begin`` needs the clips' visual states."""

    def begin(
        self,
        questions: Sequence[str],
        names: Sequence[str],
        visual: Float[Tensor, "clips K Dv"] | None,
    ) -> None:
        """A batch begins.

        Args:
            names: of the random numbers that each answer, and its drafts, are drawn with.
            visual: one clip's states serve all rows.
        """

    def propose(
        self,
        answers: Sequence[list[int]],
        states: Float[Tensor, "B m Dv"],
        fresh: Sequence[int],
        gamma: int,
    ) -> Proposed:
        """What follows every row's answer: at most ``gamma`` tokens.

        Args:
            answers: all that the rows have said.
            states: in row b, first those of its last ``fresh[b]`` tokens, which came in the last
                pass; none where the answer has ended.
        """

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""


@dataclass(frozen=True, slots=True)
class _Row:
    """An answer of a batch."""

    answer: Decoded
    draws: Draws
    """What it is drawn with, if it is."""

    @property
    def tokens(self) -> list[int]:
        return self.answer.token_ids


class BatchEngine(Engine):
    """An engine that also decodes a batch. Memory is allocated here, once."""

    def __init__(
        self,
        verifier: Decoder,
        max_new_tokens: int,
        max_prompt: int,
        batch_size: int,
        *,
        share_visual: bool = True,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            batch_size: most answers at once.
            sampling, seed: as ``Engine``'s; every row draws as it would alone.
            share_visual: the answers of a batch are about one clip, which is read once.
        """
        super().__init__(verifier, max_new_tokens, max_prompt, sampling=sampling, seed=seed)
        length = max_prompt + max_new_tokens + MAX_GAMMA
        self._batch_cache = verifier.new_cache(batch_size, length)
        self._prefix_cache = verifier.new_cache(1, max_prompt)
        self._share_visual = share_visual

    @torch.inference_mode()
    def decode_batch(
        self,
        media: Sequence[Media],
        questions: Sequence[str],
        head: BatchHead | None = None,
        gamma: int = 0,
        names: Sequence[str] | None = None,
    ) -> list[Decoded]:
        """One answer a question; every clock reading is the whole batch's.

        Args:
            media: of every question; with ``share_visual`` they are one object.
            head: drafts at most ``gamma`` tokens a cycle; None: plain decoding.
            names: of the random numbers that each is drawn with (``Engine.name_draws``); None:
                every row's own.
        """
        watch = Stopwatch(self._device)
        answers = [Decoded() for _ in questions]
        cache, last, visual = self._prefill_batch(media, questions, head)
        # Rows that shared their random numbers would all say the same.
        names = names or [f"row {row}" for row in range(len(questions))]
        draws = [self._draws_of(name) for name in names]
        rows = [_Row(*row) for row in zip(answers, draws, strict=True)]
        for row, said in zip(rows, self._row_choices(last[:, None], rows).tolist(), strict=True):
            row.answer.token_ids = said
        prefill_ms = watch.ms()
        if head is not None:
            head.begin(questions, names, visual)
        states, fresh = last[:, None], [1] * len(answers)
        while going := [i for i, row in enumerate(rows) if not self._finished(row.tokens)]:
            if _worth_leaving(len(rows) - len(going), len(rows)):
                going = cache.retire(going)
                states = states[to_device(going, self._device)]
                rows, fresh = [rows[i] for i in going], [fresh[i] for i in going]
                if head is not None:
                    head.keep_rows(going)
            states, fresh = self._cycle(cache, rows, states, fresh, head, gamma)
        total_ms = watch.ms()
        spans = [("prefill", 0.0, prefill_ms), ("decode", prefill_ms, total_ms)]
        for answer in answers:
            answer.prefill_ms, answer.total_ms = prefill_ms, total_ms
            answer.timeline = [Span("verifier", *span) for span in spans]
        return answers

    def _prefill_batch(
        self, media: Sequence[Media], questions: Sequence[str], head: BatchHead | None
    ) -> tuple[KVCache, Float[Tensor, "B Dv"], Float[Tensor, "clips K Dv"] | None]:
        """Read all prompts: the cache behind them, each row's last state, and visual states."""
        cache = self._batch_cache.first_rows(len(questions))
        if self._share_visual and len(questions) > 1:
            assert all(other is media[0] for other in media), "a shared prefix has one clip"
            states, seen = self._read_shared(media[0], questions, cache)
        else:
            states, seen = self._read_each(media, questions, cache)
        wants = head is not None and head.wants_prefilled
        visual = torch.stack([pool_visual(x) for x in seen]) if wants else None
        return cache, states[:, -1], visual

    def _read_shared(
        self, media: Media, questions: Sequence[str], cache: KVCache
    ) -> tuple[Float[Tensor, "B R Dv"], list[Float[Tensor, "visual Dv"]]]:
        """Read the clip once, lend it to all rows, and then the questions in one pass."""
        verifier, shared = self.verifier, self._prefix_cache
        visual = verifier.visual_tokens(verifier.pixels(media))
        prompts = [verifier.prompt(question) for question in questions]
        before = prompts[0].before
        assert all(prompt.before == before for prompt in prompts), "questions come behind the clip"
        shared.reset()
        seen = verifier.forward(verifier.embed_prompt(Prompt(before, ()), visual), shared)[0]
        cache.expand_from(shared)
        tails = [verifier.embed(self._ids([prompt.after]))[0] for prompt in prompts]
        return prefill(verifier, tails, 0, cache)[1], [seen[len(before) :]]

    def _read_each(
        self, media: Sequence[Media], questions: Sequence[str], cache: KVCache
    ) -> tuple[Float[Tensor, "B R Dv"], list[Float[Tensor, "visual Dv"]]]:
        verifier = self.verifier
        visuals = [verifier.visual_tokens(verifier.pixels(clip)) for clip in media]
        prompts = [verifier.prompt(question) for question in questions]
        rows = [verifier.embed_prompt(p, v)[0] for p, v in zip(prompts, visuals, strict=True)]
        _, states = prefill(verifier, rows, 0, cache)
        ends = [-len(p.after) or None for p in prompts]
        seen = [row[:end][-len(v) :] for row, end, v in zip(states, ends, visuals, strict=True)]
        return states, seen

    def _cycle(
        self,
        cache: KVCache,
        rows: Sequence[_Row],
        states: Float[Tensor, "B m Dv"],
        fresh: Sequence[int],
        head: BatchHead | None,
        gamma: int,
    ) -> tuple[Float[Tensor, "B R Dv"], list[int]]:
        """Draft, check in one pass, and say what holds; new states, and how many are a row's."""
        answers = [row.tokens for row in rows]
        shortest = min(len(answer) for answer in answers if not self._finished(answer))
        # The verifier's own token ends an answer: one draft less than there is room.
        depth = min(gamma, self.max_new_tokens - shortest - 1)
        ids, q = self._ids([answer[-1:] for answer in answers]), None
        if head is not None and depth > 0:
            drafts, q = head.propose(answers, states, fresh, depth)
            ids = torch.cat([ids, drafts], dim=1)
        new = self.verifier.forward(self.verifier.embed(ids.clamp(min=0)), cache)
        choices = self._row_choices(new, rows, ids[:, 1:], q)
        num_said: list[int] = []
        # The one time in a cycle that the device is waited for.
        for row, (drafted, chosen) in zip(
            rows, torch.stack([ids, choices], dim=1).tolist(), strict=True
        ):
            if self._finished(row.tokens):
                num_said.append(0)
                continue
            draft = Draft([token for token in drafted[1:] if token != NOTHING])
            draft = self._useful(draft, row.tokens)
            path, token = verify(draft, chosen[: len(draft) + 1])
            said = self._said(draft, path, token)
            if draft.tokens:
                row.answer.cycle_drafted.append(len(draft))
                row.answer.cycle_accepted.append(len(path))
            row.tokens.extend(said)
            num_said.append(len(said))
        # Plain rows move together, ended or not.
        if head is not None:
            cache.keep_each(ids.shape[1], num_said)
        return new[:, : max(num_said)], num_said

    def _row_choices(
        self,
        states: Float[Tensor, "B R Dv"],
        rows: Sequence[_Row],
        ids: Int[Tensor, "B n"] | None = None,
        q: Float[Tensor, "B n V"] | None = None,
    ) -> Int[Tensor, "B R"]:
        """The verifier's tokens of a pass, whose first states are the rows' last tokens'; see
        ``choose_sampled``."""
        if self._sampling is None:
            return self.verifier.chooser.best(states).view(states.shape[:2])
        if q is not None:
            # A draft for which an answer has no room is none, as where it is drawn alone.
            room = [[self.max_new_tokens - len(row.tokens) - 1] for row in rows]
            fits = torch.arange(q.shape[1], device=q.device) < to_device(room, q.device)
            q = q * fits[..., None]
        p = self._sampling.probabilities(self.verifier.logits(states))
        shape = states.shape[1], 2
        chances = [row.draws.behind(len(row.answer.token_ids), *shape) for row in rows]
        return choose_sampled(p, torch.stack(chances), ids, q)

    def _draws_of(self, name: str) -> Draws:
        """A row's own random numbers: those of an answer that is drawn alone."""
        return Draws("answers", self._seed, self._device, name)

    def _ids(self, rows: Sequence[Sequence[int]]) -> Int[Tensor, "B R"]:
        return to_device(rows, self._device)


def _worth_leaving(num_finished: int, num_rows: int) -> bool:
    """Whether finished rows should leave now: moving a head's cache costs as much as its step."""
    return 4 * num_finished >= num_rows


class AdapterRows:
    """A head on the verifier's states, for a whole batch in one step."""

    def __init__(
        self,
        head: Adapter,
        tables: VerifierTables,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            sampling: draw the drafts like this; None: take the likeliest.
            seed: of the draws, the engine's: a row's are those of its answer alone.

        Raises:
            XsdError: the head reads the drafter, which reads one answer at a time.
        """
        if "drafter" in head.row.streams:
            raise XsdError(f"level {head.row.name} reads the drafter: it drafts for one answer")
        self.wants_prefilled = head.row.visual == "prefilled"
        self._head, self._tables = head, tables
        self._dtype = next(head.parameters()).dtype
        self._max_length = max_new_tokens + MAX_GAMMA
        self._sampling, self._seed = sampling, seed

    def begin(
        self,
        questions: Sequence[str],
        names: Sequence[str],
        visual: Float[Tensor, "clips K Dv"] | None,
    ) -> None:
        self._names = list(names)
        visual = None if visual is None else visual.to(self._dtype)
        self._cache = self._head.new_cache(len(questions), self._max_length, visual)

    def propose(
        self,
        answers: Sequence[list[int]],
        states: Float[Tensor, "B m Dv"],
        fresh: Sequence[int],
        gamma: int,
    ) -> Proposed:
        device, size = states.device, states.shape[1]
        ends = [len(answer) for answer in answers]
        starts = [end - new for end, new in zip(ends, fresh, strict=True)]
        # Behind its last token a row computes what nobody reads and the drafts will overwrite.
        said = [
            a[s:] + [0] * (size - new) for a, s, new in zip(answers, starts, fresh, strict=True)
        ]
        first, after = (to_device(x, device)[:, None] for x in (starts, ends))
        at = first + torch.arange(size, device=device)
        out = self._step(to_device(said, device), states, at, max(starts) + size)
        last = to_device([max(new, 1) - 1 for new in fresh], device)
        out = out[torch.arange(len(answers), device=device), last][:, None]
        guess = self._guesser(ends, gamma)
        drafts = [guess(out, 0)]
        for step in range(1, gamma):
            out = self._step(drafts[-1].ids, out, after + step - 1, max(ends) + step)
            drafts.append(guess(out, step))
        ids = torch.cat([draft.ids for draft in drafts], dim=1)
        rows = [draft.q for draft in drafts if draft.q is not None]
        return Proposed(ids, torch.cat(rows, dim=1) if rows else None)

    def _guesser(
        self, ends: Sequence[int], gamma: int
    ) -> Callable[[Float[Tensor, "B 1 Dv"], int], Proposed]:
        """What guesses token i of ``gamma`` for every row, behind answers of these lengths."""
        sampling = self._sampling
        if sampling is None:
            return lambda out, step: Proposed(self._tables.score(out).argmax(-1))
        device = self._tables.embedding.device
        draws = [Draws("drafts", self._seed, device, name) for name in self._names]
        drawn = [own.behind(end, gamma) for own, end in zip(draws, ends, strict=True)]
        chances = torch.stack(drawn)

        def guess(out: Float[Tensor, "B 1 Dv"], step: int) -> Proposed:
            q = sampling.probabilities(self._tables.score(out))
            return Proposed(draw(q, chances[:, step : step + 1]), q)

        return guess

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._names = [self._names[row] for row in rows]
        self._cache.keep_rows(to_device(rows, self._tables.embedding.device))

    def _step(
        self, ids: Tensor, states: Tensor, at: Int[Tensor, "B R"], end: int
    ) -> Float[Tensor, "B R Dv"]:
        streams = self._head.row.streams
        token = None
        if "token" in streams:
            token = self._head.read_tokens(self._tables.embedding[ids].to(self._dtype))
        verifier = states.to(self._dtype) if "verifier" in streams else None
        return self._head.step(StepInputs(None, verifier, token), self._cache, Ragged(at, end))


class SeparateRows:
    """Heads that cost next to nothing (controls), one a row."""

    wants_prefilled = False

    def __init__(self, make: Callable[[int], Head], device: torch.device) -> None:
        """``make``: the head of a row, by its number in the batch."""
        self._make, self._device = make, device
        self._heads: list[Head] = []

    def begin(
        self,
        questions: Sequence[str],
        names: Sequence[str],
        visual: Float[Tensor, "clips K Dv"] | None,
    ) -> None:
        self._heads = [self._make(row) for row in range(len(questions))]
        for head, question in zip(self._heads, questions, strict=True):
            head.begin(question, None, None)

    def propose(
        self,
        answers: Sequence[list[int]],
        states: Float[Tensor, "B m Dv"],
        fresh: Sequence[int],
        gamma: int,
    ) -> Proposed:
        found = [
            head.propose(answer, state[:new], gamma) if new else Draft([])
            for head, answer, state, new in zip(self._heads, answers, states, fresh, strict=True)
        ]
        assert all(draft.q is None for draft in found), "heads of separate rows draw no drafts"
        drafts = [draft.tokens[:gamma] for draft in found]
        size = max(map(len, drafts))
        filled = [draft + [NOTHING] * (size - len(draft)) for draft in drafts]
        return Proposed(to_device(filled, self._device, torch.long))

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._heads = [self._heads[row] for row in rows]

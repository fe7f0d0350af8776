"""Plain and speculative decoding of the verifier: one cache, one loop.

Speculation changes when tokens are computed, never which: a draft is kept only where it equals
the verifier's own choice, and the verifier's choice after the last kept draft comes for nothing.
Where tokens are drawn, the same holds for their distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from xsd.clock import Laps, Mark, Stopwatch
from xsd.decoding.accept import (
    Draft,
    Sampling,
    accepted_prefix_length,
    choose_sampled,
    verify,
)
from xsd.decoding.config import MAX_TREE_NODES
from xsd.decoding.decoded import (
    DRAFTING,
    LM_HEAD,
    PASSES,
    PIXELS,
    PREFILL,
    REST,
    VISION,
    Decoded,
)
from xsd.decoding.draws import Draws
from xsd.decoding.loop import CompiledLoop, begun_head
from xsd.decoding.policy import Policy
from xsd.decoding.speculator import Speculator
from xsd.decoding.unread import Unread
from xsd.hidden.visual import pool_visual
from xsd.pairs.base import Decoder, Media, Prompt, Scored
from xsd.pairs.cache import TreeRows
from xsd.pairs.capture import Made
from xsd.pairs.device import to_device
from xsd.types import Span

NO_DRAFT = Draft([])


class Engine:
    """The verifier, sample after sample. Memory is allocated here, once."""

    def __init__(
        self,
        verifier: Decoder,
        max_new_tokens: int,
        max_prompt: int,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        last_chunk: int = 0,
        strict_rows: int | None = None,
    ) -> None:
        """
        Args:
            sampling: draw tokens like this; None: greedy.
            seed: of the random numbers that answers are drawn with (``name_draws``).
            last_chunk: prompt rows of the prefill's last pass, which early drafts join; 0: the
                prefill is one pass, and drafts are checked in another.
            strict_rows: every pass of decoding, a plain step too, has so many rows and attends
                over the whole cache, so that rounding is the same whatever is drafted; longer
                drafts are cut. None: passes are as short as they can be.
        """
        assert not (strict_rows and last_chunk), "a strict prefill is the same with drafts"
        self.verifier = verifier
        self.max_new_tokens = max_new_tokens
        self._sampling, self._seed, self._last_chunk = sampling, seed, last_chunk
        self.strict_rows = strict_rows
        longest_draft = max(MAX_TREE_NODES, strict_rows or 0)
        self._cache = verifier.new_cache(1, max_prompt + max_new_tokens + longest_draft)
        self._device = verifier.stack.device
        verifier.prepare(self._cache, 1 + MAX_TREE_NODES)
        self._draws = Draws("answers", seed, self._device)
        self.draft_draws = Draws("drafts", seed, self._device)
        """For heads that draw their drafts; named as the answers are."""
        self._asked: tuple[str, Prompt] | None = None
        """The question of the answer in hand."""
        self._loop: CompiledLoop | None = None
        """Cycles in compiled calls; None: they are made here, operation by operation."""
        if sampling is None and strict_rows is None:
            self._loop = CompiledLoop.of(verifier, self._cache, max_new_tokens)

    def name_draws(self, name: str) -> None:
        """The next answers are drawn with random numbers of this name: the same name, the same.

        What drafts come from must not have been drawn with those that judge them.
        """
        self._draws.name = self.draft_draws.name = name

    def prompt(self, question: str) -> Prompt:
        """A question's prompt; the one that was read last is not made again."""
        if self._asked is not None and self._asked[0] == question:
            return self._asked[1]
        return self.verifier.prompt(question)

    @torch.inference_mode()
    def plain(self, media: Media, question: str) -> Decoded:
        """Decoding one row a step: the baseline of every speedup."""
        return self._answer(media, question, None, 0, Policy())

    @torch.inference_mode()
    def speculate(
        self,
        media: Media,
        question: str,
        speculator: Speculator,
        gamma: int,
        policy: Policy | None = None,
    ) -> Decoded:
        """The same with drafts from ``speculator``: in the gap, in decode, or both.

        Args:
            gamma: longest draft of a cycle.
            policy: decides how much of it to make and verify; None: all.
        """
        try:
            return self._answer(media, question, speculator, gamma, policy or Policy())
        except BaseException:
            # The next answer finds nobody still drafting for this one.
            with suppress(Exception):  # the first error tells what went wrong
                speculator.finish()
            raise

    @property
    def is_compiled(self) -> bool:
        """Whether whole answers are one compiled call."""
        return self._loop is not None

    @property
    def length(self) -> int:
        """Positions that the last answer has filled."""
        return self._cache.length

    def timed_pass(self, num_rows: int, length: int) -> Callable[[], object]:
        """A pass of so many rows behind ``length`` positions, from ids to choices, to be timed;
        what lies there is old rows, as long to read as new ones."""
        self._cache.length = length
        if self._loop is not None:
            return self._loop.timed_pass(num_rows)

        @torch.inference_mode()
        def work() -> object:
            self._cache.length = length
            return self._pass([0] * num_rows).choose()

        return work

    def _answer(
        self,
        media: Media,
        question: str,
        speculator: Speculator | None,
        gamma: int,
        policy: Policy,
    ) -> Decoded:
        watch, num_captures = Stopwatch(self._device), Made.count
        self._laps = laps = Laps()
        result = Decoded(parts=laps.ms)
        if speculator is not None:
            speculator.start(media, question, watch)
            laps.lap(DRAFTING)
        states, early = self._prefill(media, question, speculator, watch, result)
        first = self._choices(self.verifier.score(states[:1]), 1, 0)
        tokens = result.token_ids = first.tolist()
        result.prefill_ms = watch.ms()
        laps.lap(LM_HEAD)
        if speculator is not None:
            states = self._check_gap(speculator, states, early, result, policy)
        head = begun_head(speculator) if self._loop is not None and gamma else None
        laps.lap(REST)
        if self._loop is not None and (speculator is None or not gamma or head is not None):
            done = self._loop.run(tokens, states, head, gamma, policy)
            laps.lap(REST, self._loop.parts)
            result.cycle_drafted, result.cycle_accepted = done.drafted, done.accepted
        else:
            self._cycles(speculator, states, gamma, policy, result)
        result.total_ms = watch.ms()
        laps.lap(REST)
        result.timeline.append(Span("verifier", "decode", result.prefill_ms, result.total_ms))
        if speculator is not None:
            # The next question would wait for who still drafts, so this answer's clock runs on.
            result.timeline.extend(speculator.finish())
            result.total_ms = watch.ms()
            laps.lap(DRAFTING)
            # By now the verifier has said what all drafts should have been, verified or not.
            drafts = self._gap.cut(len(tokens))
            policy.learn_gap(drafts, accepted_prefix_length(drafts.tokens, tokens))
        result.made_captures = Made.count > num_captures
        return result

    def _cycles(
        self,
        speculator: Speculator | None,
        states: Float[Tensor, "m Dv"],
        gamma: int,
        policy: Policy,
        result: Decoded,
    ) -> None:
        """Decode to the end, cycle by cycle; ``states`` are those of all tokens said."""
        tokens, unseen = result.token_ids, [states]
        while not self._finished(tokens):
            # The verifier's own token ends the answer: one draft less than there is room.
            depth = min(gamma, self.max_new_tokens - len(tokens) - 1)
            draft, num_captures = NO_DRAFT, Made.count
            drafting_ms = 0.0
            self._laps.lap(REST)
            if speculator is not None and depth > 0 and (depth := policy.depth(depth)):
                seen = unseen[0] if len(unseen) == 1 else torch.cat(unseen)
                begun = Mark(self._device)
                if (unread := self._unread(speculator, tokens, seen, depth, policy)) is not None:
                    unseen = [self._unread_cycle(unread, begun, num_captures, policy, result)]
                    continue
                asked = speculator.propose(tokens, seen, depth)
                drafting_ms = self._laps.lap(DRAFTING)
                draft, unseen = policy.select(self._useful(asked, tokens)), []
            self._laps.lap(REST)
            if draft.tokens:
                states, path = self._verify(tokens, draft)
                result.cycle_drafted.append(len(draft))
                result.cycle_accepted.append(len(path))
            else:
                # Where no draft is wanted for a while, nobody needs to be asked.
                num_rests = policy.rest() if not drafting_ms else 0
                states, path = self._steps(tokens, 1 + num_rests), []
                policy.rested(len(states) - 1)
            verifying_ms = self._lap_passes()
            if drafting_ms:
                if Made.count == num_captures:
                    policy.time(draft, drafting_ms, verifying_ms)
                policy.learn(draft, path)
            unseen.append(states)

    def _unread(
        self,
        speculator: Speculator,
        tokens: list[int],
        seen: Float[Tensor, "m Dv"],
        depth: int,
        policy: Policy,
    ) -> Unread | None:
        """A draft that is left on the device; None: nobody drafts like that, or judges so."""
        unread = getattr(speculator, "unread", None)
        if unread is None or self._loop is not None or self.strict_rows == 1:
            return None
        found: Unread | None = unread(tokens, seen, policy.whole_depth(depth))
        if found is None or self.strict_rows is None:
            return found
        return found.cut(self.strict_rows - 1)

    def _unread_cycle(
        self, unread: Unread, begun: Mark, num_captures: int, policy: Policy, result: Decoded
    ) -> Float[Tensor, "n Dv"]:
        """Verify all of a draft before anybody has read it: the cycle waits for the device once.

        Args:
            begun: when the draft was, behind so many captures.

        Returns:
            The states of the tokens added.
        """
        tokens, made = result.token_ids, Mark(self._device)
        ids = torch.cat([self.verifier.on_device(tokens[-1:]), unread.ids])
        scored = self._pass(ids, unread.tree)
        found = self._choices(scored, len(ids), len(tokens), unread.ids, unread.q)
        whole, choices = unread.read_with(found)
        drafting_ms = made.ms_since(begun)
        draft = self._useful(whole, tokens)
        path, token = verify(draft, choices[: len(draft) + 1])
        states = self._keep(tokens, draft, path, token, scored.states[: len(ids)])
        result.cycle_drafted.append(len(draft))
        result.cycle_accepted.append(len(path))
        result.unread_ms.append(drafting_ms)
        spent_ms = self._laps.lap(PASSES, {DRAFTING: drafting_ms})
        if Made.count == num_captures:
            policy.time(draft, drafting_ms, spent_ms - drafting_ms)
        policy.learn(draft, path)
        return states

    def _lap_passes(self) -> float:
        """What went by since the last lap went into passes; what they chose with, where known."""
        within = None if self._loop is None else {LM_HEAD: self._loop.parts[LM_HEAD]}
        return self._laps.lap(PASSES, within)

    def _prefill(
        self,
        media: Media,
        question: str,
        speculator: Speculator | None,
        watch: Stopwatch,
        result: Decoded,
    ) -> tuple[Float[Tensor, "m Dv"], list[int]]:
        """Fill the cache with the prompt.

        Returns the state that predicts the first token, followed by those of the drafts that
        joined the last chunk, and these drafts.
        """
        verifier = self.verifier
        self._laps.lap(REST)
        pixels = verifier.pixels(media)
        self._laps.lap(PIXELS)
        visual = verifier.visual_tokens(pixels)
        seen_ms = watch.ms()
        self._laps.lap(VISION)
        result.timeline.append(Span("verifier", "vision", 0.0, seen_ms))
        if speculator is not None and speculator.wants_projected:
            speculator.on_projected(pool_visual(visual))
        prompt = verifier.prompt(question)
        self._asked = question, prompt
        self._cache.reset()
        rows = verifier.embed_prompt(prompt, visual)
        num_rows = rows.shape[1]
        self._laps.lap(REST)
        read: list[Tensor] = []
        early: list[int] = []
        if speculator is not None and 0 < self._last_chunk < num_rows:
            first = num_rows - self._last_chunk
            read = [verifier.forward(rows[:, :first], self._cache)[0]]
            self._laps.lap(PREFILL)
            early = self._useful(speculator.gap_drafts(), ()).tokens
            # The prefill checks the first draft anyhow; one alone would add nothing.
            early = early if len(early) > 1 else []
            self._laps.lap(DRAFTING)
            joined = torch.tensor([early], dtype=torch.long, device=self._device)
            rows = torch.cat([rows[:, first:], verifier.embed(joined)], dim=1)
        num_said = 1 + len(early)
        wants_all = speculator is not None and speculator.wants_prefilled
        if wants_all:
            last = verifier.forward(rows, self._cache)[0]
            states = torch.cat([*read, last]) if read else last
        else:
            # Nobody else reads the states of a prompt, so they need not be made.
            states = verifier.prefill(rows, self._cache, num_said)[0]
        read_ms = watch.ms()
        self._laps.lap(PREFILL)
        if speculator is not None and wants_all:
            start = len(prompt.before)
            speculator.on_prefilled(pool_visual(states[start : start + len(visual)]))
        result.timeline.append(Span("verifier", "prefill", seen_ms, read_ms))
        self._laps.lap(REST)
        return states[len(states) - num_said :], early

    def _check_gap(
        self,
        speculator: Speculator,
        states: Float[Tensor, "m Dv"],
        early: list[int],
        result: Decoded,
        policy: Policy,
    ) -> Float[Tensor, "n Dv"]:
        """Check what was drafted during prefill, in one pass; states of the tokens said so far.

        The prefill itself has checked draft 0, and those in its last chunk (``early``).
        """
        tokens = result.token_ids
        is_checked = bool(early)
        drafts = self._gap = Draft(early) if early else speculator.gap_drafts()
        self._laps.lap(DRAFTING)
        result.num_free = result.gap_drafted = len(drafts)
        rest = NO_DRAFT
        path: list[int] = []
        if drafts.tokens and drafts.tokens[0] == tokens[0]:
            result.gap_accepted = 1
            rest = NO_DRAFT if self._finished(tokens) else self._useful(drafts.behind(1), tokens)
        if is_checked:
            states, path = self._judge_early(tokens, early, rest.tokens, states)
        elif rest.tokens:
            rest = rest.cut(policy.gap_size(rest))
            if rest.tokens:
                self._laps.lap(REST)
                verified, path = self._verify(tokens, rest)
                self._lap_passes()
                states = torch.cat([states, verified])
        if result.gap_accepted and not is_checked:
            result.gap_drafted = 1 + len(rest)
        result.gap_accepted += len(path)
        return states

    def _judge_early(
        self, tokens: list[int], drafts: list[int], rest: list[int], states: Float[Tensor, "m Dv"]
    ) -> tuple[Float[Tensor, "n Dv"], list[int]]:
        """Hold the drafts of the prefill's last chunk against its states, of 0..len(drafts)."""
        path: list[int] = []
        kept = 0
        if rest or (drafts[0] == tokens[0] and not self._finished(tokens)):
            draft = Draft(rest)
            scored = self.verifier.score(states[1 : len(rest) + 2])
            path, said = self._judge(draft, scored, len(tokens))
            kept = 1 + len(path)
            tokens.extend(self._said(draft, path, said))
        # The cache holds all drafts; rows of those that were said stay, but for the last token's.
        self._cache.length -= len(drafts) - min(kept, len(tokens) - 1)
        return states[: len(tokens)], path

    def _useful(self, draft: Draft, tokens: Sequence[int]) -> Draft:
        """What could still be said of a chain: up to EOS, and one less than the room that is left.

        A tree is never deeper than the room, for that is what was asked for.
        """
        if self.strict_rows is not None:
            draft = draft.cut(self.strict_rows - 1)
        if draft.parents is not None:
            return draft.cut(MAX_TREE_NODES)
        draft = draft.cut(self.max_new_tokens - len(tokens) - 1)
        for index, token in enumerate(draft.tokens):
            if token in self.verifier.eos_ids:
                return draft.cut(index + 1)
        return draft

    def _pass(self, ids: list[int] | Int[Tensor, " R"], tree: TreeRows | None = None) -> Scored:
        """Tokens behind the cache, which branch as ``tree`` says, followed by rows that fill up the
        strict shape: those leave the cache again, and nobody looks at them."""
        spare = 0
        if self.strict_rows is not None:
            spare = self.strict_rows - len(ids)
            ids = functional.pad(self.verifier.on_device(ids), (0, spare))
            tree = None if tree is None else tree.filled(spare)
        self._cache.tree, self._cache.whole = tree, self.strict_rows is not None
        scored = self.verifier.read(ids, self._cache)
        self._cache.tree, self._cache.whole = None, False
        self._cache.length -= spare
        return scored

    def _steps(self, tokens: list[int], count: int) -> Float[Tensor, "n Dv"]:
        """So many plain steps, or fewer where the answer ends."""
        if self._loop is not None:
            return self._loop.run(tokens, num_calls=count).states
        found: list[Tensor] = []
        while len(found) < count and not self._finished(tokens):
            scored = self._pass(tokens[-1:])
            tokens.append(self._judge(NO_DRAFT, scored, len(tokens))[1])
            found.append(scored.states[:1])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _verify(self, tokens: list[int], draft: Draft) -> tuple[Float[Tensor, "m Dv"], list[int]]:
        """Check a draft in one pass and say what holds, plus the verifier's own next token.

        Returns the states of the tokens added, and which drafted tokens were accepted.
        """
        if self._loop is not None:
            path, token, states = self._loop.verify(tokens[-1], draft)
            said = self._said(draft, path, token)
            tokens.extend(said)
            return states[: len(said)], path
        tree = None if draft.parents is None else tree_rows(draft.parents, self._device)
        scored = self._pass([tokens[-1], *draft.tokens], tree)
        path, token = self._judge(draft, scored, len(tokens))
        # Rows that only fill the strict shape have left the cache.
        states = scored.states[: len(draft) + 1]
        return self._keep(tokens, draft, path, token, states), path

    def _keep(
        self,
        tokens: list[int],
        draft: Draft,
        path: list[int],
        token: int,
        states: Float[Tensor, "rows Dv"],
    ) -> Float[Tensor, "n Dv"]:
        """Say what holds and the token after it, and forget the pass's other rows; nobody waits.

        Returns the states of the tokens added.
        """
        kept = [0, *(node + 1 for node in path)]
        self._cache.keep(len(states), kept)
        said = self._said(draft, path, token)
        tokens.extend(said)
        if kept[-1] == len(path):
            return states[: len(said)]
        return states[to_device(kept[: len(said)], self._device)]

    def _judge(self, draft: Draft, scored: Scored, num_said: int) -> tuple[list[int], int]:
        """What holds of a draft behind so many tokens, and the token after it.

        Args:
            scored: the root, every drafted token, and perhaps some that nobody asks.
        """
        ids = None if draft.q is None else to_device(draft.tokens, self._device)
        num_rows = len(draft) + 1
        choices = self._choices(scored, num_rows, num_said, ids, draft.q, draft.parents)
        return verify(draft, choices.tolist()[:num_rows])

    def _choices(
        self,
        scored: Scored,
        num_rows: int,
        num_said: int,
        ids: Int[Tensor, " n"] | None = None,
        q: Float[Tensor, "n V"] | None = None,
        parents: Sequence[int] | None = None,
    ) -> Int[Tensor, " rows"]:
        """The verifier's tokens at the first rows of a pass; nothing waits for them. Where drafts
        were drawn, ``choose_sampled`` says from what."""
        if self._sampling is None:
            return scored.best()
        p = self._sampling.probabilities(scored.logits()[:num_rows])
        return choose_sampled(p, self._draws.behind(num_said, num_rows, 2), ids, q, parents)

    def _said(self, draft: Draft, path: list[int], token: int) -> list[int]:
        """The accepted tokens and the verifier's own, which does not follow an end."""
        said = [draft.tokens[node] for node in path]
        if said and said[-1] in self.verifier.eos_ids:
            return said
        return [*said, token]

    def _finished(self, tokens: Sequence[int]) -> bool:
        return len(tokens) >= self.max_new_tokens or tokens[-1] in self.verifier.eos_ids


def tree_rows(parents: Sequence[int], device: torch.device) -> TreeRows:
    """The pass over a root and a tree's tokens behind it."""
    ancestors = [[True] + [False] * len(parents)]
    depths = [0]
    for row, parent in enumerate(parents, start=1):
        ancestors.append(ancestors[parent + 1].copy())
        ancestors[-1][row] = True
        depths.append(depths[parent + 1] + 1)
    return TreeRows(to_device(depths, device), to_device(ancestors, device))

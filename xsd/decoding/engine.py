"""Plain and speculative greedy decoding of the verifier: one cache, one loop.

Speculation changes when tokens are computed, never which: a draft is kept only where it equals
the verifier's own choice, and the verifier's choice after the last kept draft comes for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.clock import Stopwatch
from xsd.decoding.accept import verify_greedy
from xsd.decoding.speculator import Speculator
from xsd.hidden.visual import pool_visual
from xsd.pairs.base import Decoder, Media
from xsd.types import Span


@dataclass
class Decoded:
    """One answer with its clock readings (milliseconds) and draft counts."""

    token_ids: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    total_ms: float = 0.0
    gap_drafted: int = 0
    gap_accepted: int = 0
    cycle_drafted: list[int] = field(default_factory=list)
    cycle_accepted: list[int] = field(default_factory=list)
    timeline: list[Span] = field(default_factory=list)

    @property
    def decode_ms(self) -> float:
        return self.total_ms - self.prefill_ms


class Engine:
    """The verifier, sample after sample. Memory is allocated here, once."""

    def __init__(self, verifier: Decoder, max_new_tokens: int, max_prompt: int) -> None:
        self.verifier = verifier
        self.max_new_tokens = max_new_tokens
        self._cache = verifier.new_cache(1, max_prompt + max_new_tokens)
        self._device = verifier.stack.device

    @torch.inference_mode()
    def plain(self, media: Media, question: str) -> Decoded:
        """Greedy decoding, one row a step: the baseline of every speedup."""
        return self._decode(media, question, None, 0)

    @torch.inference_mode()
    def speculate(self, media: Media, question: str, speculator: Speculator, gamma: int) -> Decoded:
        """The same answer with drafts from ``speculator``: in the gap, in decode, or both."""
        return self._decode(media, question, speculator, gamma)

    def _decode(
        self, media: Media, question: str, speculator: Speculator | None, gamma: int
    ) -> Decoded:
        watch = Stopwatch(self._device)
        result = Decoded()
        if speculator is not None:
            speculator.start(media, question, watch)
        state = self._prefill(media, question, speculator, watch, result)
        tokens = result.token_ids = [int(self.verifier.logits(state[0]).argmax())]
        result.prefill_ms = watch.ms()
        if speculator is not None:
            state = self._check_gap(speculator, state, result)
        while not self._finished(tokens):
            drafts: list[int] = []
            # The verifier's own token ends the answer: one draft less than there is room.
            depth = min(gamma, self.max_new_tokens - len(tokens) - 1)
            if speculator is not None and depth > 0:
                drafts = self._useful(speculator.propose(tokens, state, depth), tokens)
            if drafts:
                state, accepted = self._verify(tokens, drafts)
                result.cycle_drafted.append(len(drafts))
                result.cycle_accepted.append(accepted)
            else:
                state = self._step(tokens)
        result.total_ms = watch.ms()
        result.timeline.append(Span("verifier", "decode", result.prefill_ms, result.total_ms))
        if speculator is not None:
            result.timeline.extend(speculator.finish())
        return result

    def _prefill(
        self,
        media: Media,
        question: str,
        speculator: Speculator | None,
        watch: Stopwatch,
        result: Decoded,
    ) -> Float[Tensor, "1 Dv"]:
        """Fill the cache with the prompt; the state that predicts the first token."""
        verifier = self.verifier
        visual = verifier.visual_tokens(verifier.pixels(media))
        seen_ms = watch.ms()
        result.timeline.append(Span("verifier", "vision", 0.0, seen_ms))
        if speculator is not None and speculator.wants_projected:
            speculator.on_projected(pool_visual(visual))
        prompt = verifier.prompt(question)
        self._cache.reset()
        states = verifier.forward(verifier.embed_prompt(prompt, visual), self._cache)[0]
        if speculator is not None and speculator.wants_prefilled:
            start = len(prompt.before)
            speculator.on_prefilled(pool_visual(states[start : start + len(visual)]))
        result.timeline.append(Span("verifier", "prefill", seen_ms, watch.ms()))
        return states[-1:]

    def _check_gap(
        self, speculator: Speculator, state: Float[Tensor, "1 Dv"], result: Decoded
    ) -> Float[Tensor, "m Dv"]:
        """Check what was drafted during prefill, in one pass; states of the tokens said so far.

        The prefill itself has checked draft 0.
        """
        tokens = result.token_ids
        drafts = speculator.gap_drafts()
        result.gap_drafted = len(drafts)
        if not drafts or drafts[0] != tokens[0]:
            return state
        result.gap_accepted = 1
        rest = self._useful(drafts[1:], tokens)
        if not rest or self._finished(tokens):
            return state
        states, accepted = self._verify(tokens, rest)
        result.gap_accepted += accepted
        return torch.cat([state, states])

    def _useful(self, drafts: list[int], tokens: Sequence[int]) -> list[int]:
        """Drafts that could still be said: up to EOS, and one less than the room that is left."""
        drafts = drafts[: self.max_new_tokens - len(tokens) - 1]
        for index, token in enumerate(drafts):
            if token in self.verifier.eos_ids:
                return drafts[: index + 1]
        return drafts

    def _step(self, tokens: list[int]) -> Float[Tensor, "1 Dv"]:
        """One plain step."""
        rows = self.verifier.embed(torch.tensor([tokens[-1:]], device=self._device))
        state = self.verifier.forward(rows, self._cache)[0]
        tokens.append(int(self.verifier.logits(state[0]).argmax()))
        return state

    def _verify(self, tokens: list[int], drafts: list[int]) -> tuple[Float[Tensor, "m Dv"], int]:
        """Check a chain in one pass and say what holds, plus the verifier's own next token.

        Returns the states of the tokens added, and how many drafts were accepted.
        """
        rows = self.verifier.embed(torch.tensor([[tokens[-1], *drafts]], device=self._device))
        states = self.verifier.forward(rows, self._cache)[0]
        chosen: list[int] = self.verifier.logits(states).argmax(-1).tolist()
        accepted, _ = verify_greedy(drafts, chosen)
        self._cache.length -= len(drafts) - accepted
        said = chosen[: accepted + 1]
        if accepted and drafts[accepted - 1] in self.verifier.eos_ids:
            said = chosen[:accepted]
        tokens.extend(said)
        return states[: len(said)], accepted

    def _finished(self, tokens: Sequence[int]) -> bool:
        return len(tokens) >= self.max_new_tokens or tokens[-1] in self.verifier.eos_ids

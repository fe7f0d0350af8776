"""An answer as it comes, with the drafts that held marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

from jaxtyping import Float
from torch import Tensor

from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft, accepted_prefix_length
from xsd.decoding.policy import Policy
from xsd.decoding.speculator import Speculator
from xsd.pairs.base import Media
from xsd.types import Span

Mark = Literal["gap", "head"]
"""An accepted draft made while the verifier was reading, or one made while it was decoding."""

_COLOURS: Final = {"gap": ("\x1b[36m", "\x1b[0m"), "head": ("\x1b[32m", "\x1b[0m")}
_BRACKETS: Final = {"gap": ("{", "}"), "head": ("[", "]")}


class MarkedText:
    """Tokens to text, written as soon as it is whole characters."""

    def __init__(
        self,
        write: Callable[[str], object],
        decode: Callable[[Sequence[int]], str],
        *,
        colour: bool,
    ) -> None:
        self._write = write
        self._decode = decode
        self._marks = _COLOURS if colour else _BRACKETS
        self._ids: list[int] = []
        self._text = ""
        self._mark: Mark | None = None

    def legend(self, mark: Mark, words: str) -> str:
        begin, end = self._marks[mark]
        return f"{begin}{words}{end}"

    def add(self, ids: Sequence[int], mark: Mark | None) -> None:
        """Write tokens of one kind; None: the verifier's own."""
        for token in ids:
            self._ids.append(token)
            text = self._decode(self._ids)
            # Half of a character: its other bytes are still to come.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._continue(text[len(self._text) :], mark)
                self._text = text

    def close(self) -> None:
        self._turn(None)
        self._write("\n")

    def _continue(self, piece: str, mark: Mark | None) -> None:
        if piece and mark != self._mark:
            words = piece.lstrip()
            self._turn(mark, space=piece[: len(piece) - len(words)])
            piece = words
        self._write(piece)

    def _turn(self, mark: Mark | None, space: str = "") -> None:
        """End one kind of text and begin another; the space between belongs to neither."""
        if self._mark is not None:
            self._write(self._marks[self._mark][1])
        self._write(space)
        if mark is not None:
            self._write(self._marks[mark][0])
        self._mark = mark


class Watched:
    """A drafting party that shows, when it is asked for drafts, what became of the last ones.

    The engine must go by ``policy``: that is where it tells what it verified and accepted.
    """

    def __init__(
        self, party: Speculator, policy: Policy, text: MarkedText, max_new_tokens: int
    ) -> None:
        self._party = party
        self._text = text
        self._max_gap = max_new_tokens - 1
        self._gap: list[int] = []
        """Of the gap's drafts those that may be verified."""
        self._num_shown = self._num_held = 0
        self.policy: Policy = _Told(policy, self)
        self.wants_projected = party.wants_projected
        self.wants_prefilled = party.wants_prefilled

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        self._party.start(media, question, watch)

    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._party.on_projected(visual)

    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._party.on_prefilled(visual)

    def gap_drafts(self) -> Draft:
        draft = self._party.gap_drafts()
        # The verifier's own token ends an answer that is as long as it may be.
        self._gap = draft.tokens[: self._max_gap]
        return draft

    def gap_cut(self, size: int) -> None:
        """So many of the gap's further drafts are verified."""
        self._gap = self._gap[: 1 + size]

    def held(self, num_drafts: int) -> None:
        """So many drafts of a cycle were verified and accepted."""
        self._num_held = num_drafts

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        self.show(tokens)
        return self._party.propose(tokens, states, gamma)

    def finish(self) -> list[Span]:
        return self._party.finish()

    def show(self, tokens: Sequence[int]) -> None:
        """Write what is new in ``tokens``, the answer so far."""
        new = tokens[self._num_shown :]
        mark: Mark = "head" if self._num_shown else "gap"
        if not self._num_shown:
            # These were chosen, not drawn: one that was refused is never what was said instead.
            self._num_held = accepted_prefix_length(self._gap, new)
        self._text.add(new[: self._num_held], mark)
        self._text.add(new[self._num_held :], None)
        self._num_shown, self._num_held = len(tokens), 0


class _Told(Policy):
    """A policy that tells on what became of drafts; it decides as the one it stands for."""

    def __init__(self, policy: Policy, watched: Watched) -> None:
        self._policy, self._watched = policy, watched

    def gap_size(self, draft: Draft) -> int:
        size = self._policy.gap_size(draft)
        self._watched.gap_cut(min(size, len(draft)))
        return size

    def learn_gap(self, draft: Draft, held: int) -> None:
        self._policy.learn_gap(draft, held)

    def depth(self, limit: int) -> int:
        return self._policy.depth(limit)

    def rest(self) -> int:
        return self._policy.rest()

    def rested(self, num_cycles: int) -> None:
        self._policy.rested(num_cycles)

    def select(self, draft: Draft) -> Draft:
        return self._policy.select(draft)

    def learn(self, draft: Draft, path: Sequence[int]) -> None:
        self._watched.held(len(path))
        self._policy.learn(draft, path)

    def time(self, draft: Draft, drafting_ms: float, verifying_ms: float) -> None:
        self._policy.time(draft, drafting_ms, verifying_ms)

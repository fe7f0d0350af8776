"""An answer as it comes, with the drafts that held marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

from jaxtyping import Float
from torch import Tensor

from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
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
    """A drafting party that shows, when it is asked for drafts, what became of the last ones."""

    def __init__(self, party: Speculator, text: MarkedText) -> None:
        self._party = party
        self._text = text
        self._num_shown = 0
        self._draft = Draft([])
        self.wants_projected = party.wants_projected
        self.wants_prefilled = party.wants_prefilled

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        self._party.start(media, question, watch)

    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._party.on_projected(visual)

    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._party.on_prefilled(visual)

    def gap_drafts(self) -> Draft:
        self._draft = self._party.gap_drafts()
        return self._draft

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        self.show(tokens)
        self._draft = draft = self._party.propose(tokens, states, gamma)
        return draft

    def finish(self) -> list[Span]:
        return self._party.finish()

    def show(self, tokens: Sequence[int]) -> None:
        """Write what is new in ``tokens``, the answer so far."""
        new = tokens[self._num_shown :]
        mark: Mark = "head" if self._num_shown else "gap"
        num_held = _num_held(self._draft, new)
        self._text.add(new[:num_held], mark)
        self._text.add(new[num_held:], None)
        self._num_shown = len(tokens)
        self._draft = Draft([])


def _num_held(draft: Draft, said: Sequence[int]) -> int:
    """Tokens of ``said`` that follow a path of ``draft`` from its root."""
    node = -1
    for number, token in enumerate(said):
        held = next((child for child in draft.children(node) if draft.tokens[child] == token), None)
        if held is None:
            return number
        node = held
    return len(said)

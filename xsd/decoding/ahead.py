"""Coupled drafting that goes on: behind the prompt, and behind whatever the verifier says next.

Where drafter and verifier have devices of their own, the drafter need not wait while its drafts
are verified: it drafts on behind them. What turns out otherwise is forgotten in O(1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.cache import AdapterCache
from xsd.adapters.compiled import CompiledCache
from xsd.adapters.rows import StepInputs
from xsd.decoding.reader import DrafterReader, common_prefix
from xsd.decoding.tables import VerifierTables
from xsd.decoding.unread import Unread

_NO_STATES = torch.zeros(0, 0)


class CoupledDrafter:
    """Drafter and adapter in turn: the drafter is fed what adapter and LM head expect the verifier
    to say."""

    def __init__(
        self, reader: DrafterReader, adapter: Adapter, tables: VerifierTables, max_length: int
    ) -> None:
        """``max_length``: tokens said and drafted, at most."""
        self.max_length = max_length
        self._reader, self._adapter, self._tables = reader, adapter, tables
        self._dtype = next(adapter.parameters()).dtype
        self._cache: AdapterCache | CompiledCache | None = None
        self.tokens: list[int] = []
        """Said and drafted so far."""
        self.confidence: list[float] = []
        """How probable each of them is, as the adapter sees it; said ones: one."""
        self._vocabulary = tables.vocabulary(None) if reader.is_compiled else None

    def begin(self, visual: Float[Tensor, "K Dv"] | None) -> None:
        """A sample begins, with the clip's visual vectors where the adapter attends to any."""
        self.tokens, self.confidence = [], []
        self._num_rows = 0
        given = None if visual is None else visual[None].to(self._dtype)
        if self._cache is None:
            self._cache = self._adapter.new_cache(1, self.max_length, given)
        else:
            self._cache.begin_sample(given)

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow."""
        is_full = len(self.tokens) >= self.max_length
        return is_full or (bool(self.tokens) and self.tokens[-1] in self._tables.eos_ids)

    def follow(self, said: Sequence[int]) -> None:
        """So much is said by now: drafts that agree stay, others are forgotten."""
        num_common = common_prefix(self.tokens, said)
        if num_common < len(said):
            self.tokens = list(said)
            self.confidence = [1.0] * len(said)
            # The row at a position knows the tokens before it.
            self._num_rows = min(self._num_rows, num_common + 1)

    def extend(self, count: int) -> None:
        """Draft at most so many tokens more."""
        assert self._cache is not None, "extend comes after begin"
        if self._vocabulary is not None and isinstance(self._cache, CompiledCache):
            found, sure = self._reader.draft_coupled(
                self._cache, self.tokens, self._num_rows, _NO_STATES, count, self._vocabulary, 0
            )
            self.tokens += found
            self.confidence += sure
            self._num_rows = len(self.tokens)
            return
        while count and not self.is_done:
            end = len(self.tokens) + 1
            states = self._reader.states(self.tokens, self._num_rows, end)
            self._cache.length = self._num_rows
            rows = StepInputs(drafter=states[None].to(self._dtype))
            out = self._adapter.step(rows, self._cache)[:, -1:]
            best, index = torch.softmax(self._tables.score(out)[0, 0], -1).max(-1)
            self.tokens.append(int(index))
            self.confidence.append(float(best))
            self._num_rows = end
            count -= 1

    def unread(self, num_said: int, count: int) -> Unread | None:
        """So many drafts behind what is said, left on the device; None: they are known, or made
        step by step. What becomes of them, ``follow`` tells."""
        return None


_SAID, _FOLLOWED, _END = range(3)
NUM_WORDS = 3


class Board:
    """What a verifier and a drafter that goes on tell each other.

    Every word has one writer, so it serves processes that share the arrays as well as threads. The
    verifier takes what lies there. Waiting for more would not pay: a plain step says a token for
    sure in about the time of two drafts. It waits for one thing only, that the drafter has heard of
    a token which it had not drafted, and that is for one draft at most.
    """

    def __init__(
        self,
        words: Int[np.ndarray, " 3"],
        said: Int[np.ndarray, " positions"],
        drafts: Int[np.ndarray, " positions"],
    ) -> None:
        """All int64; ``said`` and ``drafts`` by answer position."""
        self._words, self._tokens, self._drafts = words, said, drafts
        self._agrees = True

    @classmethod
    def of_threads(cls, max_new_tokens: int) -> Board:
        """In the memory of one process."""
        sizes = NUM_WORDS, max_new_tokens, max_new_tokens
        return cls(*(np.zeros(size, np.int64) for size in sizes))

    def begin(self) -> None:
        """A sample begins."""
        self._words[:] = 0
        self._agrees = True

    def tell(self, tokens: Sequence[int]) -> None:
        """The verifier has said so much; what it told before must be current by now."""
        start, end = int(self._words[_SAID]), len(tokens)
        # What it says as it was drafted needs no answer: what lies behind it holds on.
        is_drafted = int(self._words[_END]) >= end
        self._agrees = is_drafted and self._drafts[start:end].tolist() == list(tokens[start:])
        self._tokens[:end] = tokens
        self._words[_SAID] = end

    @property
    def is_current(self) -> bool:
        """Whether what was drafted follows what was told last."""
        return self._agrees or bool(self._words[_FOLLOWED] == self._words[_SAID])

    def drafts(self, count: int) -> list[int]:
        """What lies there now, at most so many; none is waited for."""
        start, end = int(self._words[_SAID]), int(self._words[_END])
        found: list[int] = self._drafts[start : min(end, start + count)].tolist()
        return found

    def draft(
        self,
        drafter: CoupledDrafter,
        first: int,
        ahead: int,
        is_over: Callable[[], bool],
        pause: Callable[[], None],
    ) -> None:
        """The drafter's side: draft until ``is_over``.

        Args:
            first: drafts before anything was said, at most.
            ahead: drafts behind what was said, at most.
            pause: called where there is nothing to do.
        """
        words = self._words
        limit = first
        while not is_over():
            num_said = int(words[_SAID])
            if num_said != words[_FOLLOWED]:
                drafter.follow(self._tokens[:num_said].tolist())
                limit = num_said + ahead
                words[_END] = len(drafter.tokens)
                words[_FOLLOWED] = num_said
            if len(drafter.tokens) < limit and not drafter.is_done:
                drafter.extend(1)
                end = len(drafter.tokens)
                self._drafts[end - 1] = drafter.tokens[-1]
                words[_END] = end
            else:
                pause()

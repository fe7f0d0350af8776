"""Who guesses the verifier's next tokens: the drafter through an adapter, or a head.

Adapters compute in the precision they were trained in, whatever the models' own: states are
converted here on their way in and out.

Nothing here is rolled back explicitly. ``DrafterReader`` is asked for the states after a token
sequence and finds out by itself how much of it the drafter has already read; a head's cache is
cut to the verifier's own rows before every cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter, StepInputs
from xsd.pairs.base import Decoder, Media

Logits = Callable[[Float[Tensor, "*rows Dv"]], Float[Tensor, "*rows V"]]


@dataclass(frozen=True)
class VerifierTables:
    """The parts of the verifier that a draft needs: token embeddings in, logits out."""

    embedding: Float[Tensor, "V Dv"]
    logits: Logits
    eos_ids: frozenset[int]

    @classmethod
    def of(cls, verifier: Decoder) -> VerifierTables:
        return cls(verifier.embedding, verifier.logits, verifier.eos_ids)

    def choose(self, hidden: Float[Tensor, "*rows Dv"]) -> Int[Tensor, "*rows"]:
        return self.logits(hidden.to(self.embedding.dtype)).argmax(-1)


class DrafterReader:
    """The drafter on one sample: its state after any prefix of any token sequence."""

    def __init__(self, drafter: Decoder, max_new_tokens: int, max_prompt: int) -> None:
        self.drafter = drafter
        self._cache = drafter.new_cache(1, max_prompt + max_new_tokens)
        stack = drafter.stack
        self._states = torch.zeros(
            max_new_tokens + 1, drafter.width, device=stack.device, dtype=stack.dtype
        )
        self._read: list[int] = []
        self._prompt_length = 0

    def begin(self, media: Media, question: str) -> None:
        """Vision, projection and prefill; afterwards ``states`` may be asked."""
        rows = self.drafter.prompt_embeddings(media, question)
        self._cache.reset()
        self._read = []
        self._prompt_length = rows.shape[1]
        self._states[0] = self.drafter.forward(rows, self._cache)[0, -1]

    def states(self, tokens: Sequence[int], start: int, stop: int) -> Float[Tensor, "rows Dd"]:
        """``e[start:stop]``, where ``e[j]`` has read ``tokens[:j]``.

        Only tokens not yet read are fed; what was read beyond a difference is forgotten.
        """
        wanted = list(tokens[: stop - 1])
        common = _common_prefix(self._read, wanted)
        if common < len(wanted):
            new = wanted[common:]
            self._cache.length = self._prompt_length + common
            rows = self.drafter.embed(torch.tensor([new], device=self._states.device))
            self._states[common + 1 : stop] = self.drafter.forward(rows, self._cache)[0]
            self._read = wanted
        return self._states[start:stop]

    def choose(self, state: Float[Tensor, " Dd"]) -> int:
        """The drafter's own next token."""
        return int(self.drafter.logits(state).argmax())


def _common_prefix(left: list[int], right: list[int]) -> int:
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(i for i in range(size) if left[i] != right[i])


def coupled_drafts(
    reader: DrafterReader,
    adapter: Adapter,
    tables: VerifierTables,
    visual: Float[Tensor, "K Dv"] | None,
    limit: int,
) -> Iterator[int]:
    """Drafts one by one; the drafter is fed what adapter and LM head expect the verifier to say."""
    cache = adapter.new_cache(1, limit, None if visual is None else _for(adapter, visual[None]))
    tokens: list[int] = []
    while len(tokens) < limit:
        position = len(tokens)
        state = reader.states(tokens, position, position + 1)
        inputs = StepInputs(drafter=_for(adapter, state[None]))
        token = int(tables.choose(adapter.step(inputs, cache)[0, 0]))
        tokens.append(token)
        yield token
        if token in tables.eos_ids:
            return


def _for(adapter: Adapter, states: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """States of a model as an adapter takes them."""
    return states.to(next(adapter.parameters()).dtype)


def free_tokens(reader: DrafterReader, limit: int) -> Iterator[int]:
    """The drafter's own text, token by token (the seed's free-running mode)."""
    tokens: list[int] = []
    while len(tokens) < limit:
        position = len(tokens)
        token = reader.choose(reader.states(tokens, position, position + 1)[0])
        tokens.append(token)
        yield token
        if token in reader.drafter.eos_ids:
            return


def adapt_free(
    reader: DrafterReader, own: Sequence[int], adapter: Adapter, tables: VerifierTables
) -> list[int]:
    """Free-running states through the adapter in one pass: drafts ``0..len(own) - 1``."""
    if not own:
        return []
    states = _for(adapter, reader.states(own, 0, len(own)))
    out = adapter.step(StepInputs(drafter=states[None]), adapter.new_cache(1, len(own)))
    drafts: list[int] = tables.choose(out[0]).tolist()
    return drafts


class HeadDrafter:
    """A head on the verifier's states: a few rows in, a chain of drafts out."""

    def __init__(self, head: Adapter, tables: VerifierTables, max_new_tokens: int) -> None:
        self.head = head
        self.tables = tables
        self.max_length = max_new_tokens + 16
        row = head.row
        self._reads_verifier = "verifier" in row.streams
        self._reads_token = "token" in row.streams
        self._reads_drafter = "drafter" in row.streams
        # E2 attends to e[<= t + 1]: the drafter has read the token just chosen.
        self._ahead = 1 if head.memory == "drafter" else 0

    def begin(self, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None) -> None:
        """Start a sample; ``visual`` and ``reader`` only where the level's row asks for them."""
        self._cache = self.head.new_cache(
            1, self.max_length, None if visual is None else _for(self.head, visual[None])
        )
        self._reader = reader

    @torch.inference_mode()
    def propose(
        self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int
    ) -> list[int]:
        """Draft the ``gamma`` tokens after ``tokens``.

        Args:
            tokens: everything said so far, ``y[0..t]``.
            states: the verifier's states of the last ``m`` of them, ``v[t-m+1..t]``; earlier rows
                came in earlier cycles.
        """
        sequence = list(tokens)
        end = len(sequence)
        start = end - states.shape[0]
        self._cache.length = start
        hidden = self._step(sequence, start, end, _for(self.head, states[None]))
        out = hidden[:, -1:]
        for _ in range(gamma - 1):
            sequence.append(int(self.tables.choose(out)))
            out = self._step(sequence, len(sequence) - 1, len(sequence), out)
        sequence.append(int(self.tables.choose(out)))
        return sequence[end:]

    def _step(
        self, sequence: list[int], start: int, stop: int, states: Float[Tensor, "1 m Dv"]
    ) -> Float[Tensor, "1 m Dv"]:
        drafter = token = None
        if self._reads_drafter:
            assert self._reader is not None
            first = 0 if start == 0 else start + self._ahead
            read = self._reader.states(sequence, first, stop + self._ahead)
            drafter = _for(self.head, read[None])
        if self._reads_token:
            ids = torch.tensor([sequence[start:stop]], device=states.device)
            token = _for(self.head, self.tables.embedding[ids])
        verifier = states if self._reads_verifier else None
        return self.head.step(StepInputs(drafter, verifier, token), self._cache)

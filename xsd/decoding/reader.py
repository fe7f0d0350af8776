"""The drafter on one sample: its state after any prefix of any token sequence.

Nothing here is rolled back explicitly. ``DrafterReader`` is asked for the states after a token
sequence and finds out by itself how much of it the drafter has already read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.compiled import CompiledCache, ReadAlong, Vocabulary
from xsd.adapters.rows import StepInputs
from xsd.decoding.tables import VerifierTables, cast_to
from xsd.pairs.base import Decoder, Media
from xsd.pairs.cache import KVCache
from xsd.pairs.step import DecoderStack


@dataclass
class ReaderMemory:
    """What a drafter knows of a sample: its cache, and its states after so many tokens.

    Two processes may work on one memory in turn.
    """

    cache: KVCache
    states: Float[Tensor, "positions Dd"]

    @classmethod
    def new(cls, drafter: Decoder, max_new_tokens: int, max_prompt: int) -> ReaderMemory:
        stack = drafter.stack
        cache = drafter.new_cache(1, max_prompt + max_new_tokens)
        shape = max_new_tokens + 1, drafter.width
        return cls(cache, torch.zeros(shape, device=stack.device, dtype=stack.dtype))

    def share(self) -> None:
        """Move it, in place, to where other processes can see it; before anything looks at it.

        Raises:
            RuntimeError: there is no room.
        """
        for tensor in (self.cache.keys, self.cache.values, self.states):
            tensor.share_memory_()


class DrafterReader:
    """The drafter on one sample: its state after any prefix of any token sequence."""

    def __init__(self, drafter: Decoder, memory: ReaderMemory) -> None:
        self.drafter = drafter
        self._cache, self._states = memory.cache, memory.states
        self._read: list[int] = []
        self._prompt_length = 0
        stack = drafter.stack
        self._start = torch.zeros(1, dtype=torch.long, device=stack.device)
        """The prompt's length where ``read_at`` is told of it."""
        compiled = stack.compiled if isinstance(stack, DecoderStack) else None
        self._along: ReadAlong | None = None
        if compiled is not None:
            embedding, decoder = drafter.embedding.numpy(), compiled.arguments(self._cache)
            self._along = ReadAlong(embedding, decoder, self._states.numpy(), 0, 0)

    @property
    def progress(self) -> tuple[int, list[int]]:
        """Rows of the prompt, and the tokens read behind it."""
        return self._prompt_length, self._read

    def take_over(self, prompt_length: int, read: list[int]) -> None:
        """Go on from another reader's ``progress`` on the same memory."""
        self._prompt_length, self._read = prompt_length, read

    def begin(self, media: Media, question: str) -> None:
        """Vision, projection and prefill; afterwards ``states`` may be asked."""
        rows = self.drafter.prompt_embeddings(media, question)
        self._cache.reset()
        self._read = []
        self._prompt_length = rows.shape[1]
        self._states[0] = self.drafter.prefill(rows, self._cache, 1)[0, 0]

    def states(self, tokens: Sequence[int], start: int, stop: int) -> Float[Tensor, "rows Dd"]:
        """``e[start:stop]``, where ``e[j]`` has read ``tokens[:j]``.

        Only tokens not yet read are fed; what was read beyond a difference is forgotten.
        """
        wanted = list(tokens[: stop - 1])
        common = common_prefix(self._read, wanted)
        if common < len(wanted):
            new = wanted[common:]
            self._cache.length = self._prompt_length + common
            rows = self.drafter.embed(torch.tensor([new], device=self._states.device))
            self._states[common + 1 : stop] = self.drafter.forward(rows, self._cache)[0]
            self._read = wanted
        return self._states[start:stop]

    def fits_capture(self, device: torch.device) -> bool:
        """Whether ``read_at`` can be part of what is captured on a device."""
        stack = self.drafter.stack
        return isinstance(stack, DecoderStack) and stack.device == device and stack.tap is None

    def begin_at(self) -> Float[Tensor, "1 Dd"]:
        """``e[0]``; from here on ``read_at`` reads, and tokens read before are forgotten."""
        self._read = []
        self._start.fill_(self._prompt_length)
        return self._states[:1]

    def check_room(self, num_tokens: int) -> None:
        """Raise AssertionError where so many tokens do not fit behind the prompt."""
        room = self._cache.max_length - self._prompt_length
        assert num_tokens <= room, f"the drafter has room for {room} tokens, not {num_tokens}"

    def read_at(self, ids: Int[Tensor, " R"], at: Int[Tensor, " R"]) -> Float[Tensor, "R Dd"]:
        """``e[at + 1]``: states after these tokens, whose answer positions, one behind the other,
        are given on the device."""
        stack = self.drafter.stack
        assert isinstance(stack, DecoderStack), "only such a stack reads where a device says"
        rows = self.drafter.embed(ids[None])
        return stack.forward_at(rows, self._cache, self._start + at[:1])[0]

    @property
    def is_compiled(self) -> bool:
        """Whether ``draft_coupled`` can be called."""
        return self._along is not None

    def draft_coupled(
        self,
        cache: CompiledCache,
        tokens: Sequence[int],
        first: int,
        states: Float[Tensor, "m Dv"],
        gamma: int,
        vocabulary: Vocabulary,
        shift: int,
    ) -> tuple[list[int], list[float]]:
        """``CompiledCache.draft_coupled`` behind ``tokens``, with this drafter reading along."""
        assert self._along is not None, "the drafter's layers are not compiled"
        said = list(tokens)
        self._along.prompt_length = self._prompt_length
        self._along.num_read = common_prefix(self._read, said)
        found = cache.draft_coupled(said, first, states, gamma, vocabulary, self._along, shift)
        self._read = [*said, *found[0]][: self._along.num_read]
        return found

    def choose(self, state: Float[Tensor, " Dd"]) -> int:
        """The drafter's own next token."""
        return self.drafter.choose(state)[0]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens with which both begin."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(i for i in range(size) if left[i] != right[i])


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
    states = cast_to(adapter, reader.states(own, 0, len(own)))
    out = adapter.step(StepInputs(drafter=states[None]), adapter.new_cache(1, len(own)))
    return tables.choose(out[0])

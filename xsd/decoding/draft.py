"""Who guesses the verifier's next tokens: the drafter through an adapter, or a head.

Adapters compute in the precision they were trained in, whatever the models' own: states are
converted here on their way in and out.

Nothing here is rolled back explicitly. ``DrafterReader`` is asked for the states after a token
sequence and finds out by itself how much of it the drafter has already read; a head's cache is
cut to the verifier's own rows before every cycle.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.cache import AdapterCache
from xsd.adapters.compiled import CompiledCache, ReadAlong, Shape, Vocabulary
from xsd.adapters.rows import Siblings, StepInputs
from xsd.decoding.accept import Draft, Sampling, draw
from xsd.decoding.config import MAX_GAMMA
from xsd.decoding.policy import Policy
from xsd.decoding.unread import Unread
from xsd.errors import XsdError
from xsd.pairs.base import Decoder, Media
from xsd.pairs.cache import KVCache
from xsd.pairs.choose import Chooser
from xsd.pairs.step import DecoderStack

READ_TOKENS_BYTES = 1 << 28
"""A head reads all token embeddings in advance unless they are larger."""


@dataclass(frozen=True)
class VerifierTables:
    """The parts of the verifier that a draft needs: token embeddings in, logits out.

    They hold nothing of its layers, so that a process which only drafts can be given them.
    """

    embedding: Float[Tensor, "ids Dv"]
    lm_head: Any
    """Module from states to logits of the ids that the pair shares."""
    vocab_size: int
    """How many those are."""
    eos_ids: frozenset[int]

    @classmethod
    def of(cls, verifier: Decoder) -> VerifierTables:
        return cls(verifier.embedding, verifier.lm_head, verifier.vocab_size, verifier.eos_ids)

    def on(self, device: torch.device) -> VerifierTables:
        """These, or a copy on another device for a drafter that lies there."""
        if self.embedding.device == device:
            return self
        head = copy.deepcopy(self.lm_head).to(device)
        return VerifierTables(self.embedding.to(device), head, self.vocab_size, self.eos_ids)

    def share(self) -> None:
        """Move them, in place, to where other processes can see them.

        Raises:
            RuntimeError: there is no room.
        """
        self.embedding.share_memory_()
        self.lm_head.share_memory()

    def choose(self, hidden: Float[Tensor, "*rows Dv"]) -> list[int]:
        """The likeliest token of every row, of states in an adapter's own precision."""
        return self.chooser(hidden.to(self.embedding.dtype))

    @cached_property
    def chooser(self) -> Chooser:
        return Chooser(self.lm_head)

    def vocabulary(self, read: Float[Tensor, "ids Dv"] | None) -> Vocabulary | None:
        """What compiled chains need to know of the tokens; None: the LM head is not compiled.

        Args:
            read: every embedding as a head reads it; None: it reads no tokens.
        """
        panels = self.chooser.panels
        if panels is None:
            return None
        table = self.embedding[:0] if read is None else read
        eos = np.array(sorted(self.eos_ids), np.int64)
        return Vocabulary(table.numpy(), panels, self.vocab_size, eos)

    def score(self, hidden: Float[Tensor, "*rows Dv"]) -> Float[Tensor, "*rows V"]:
        """Logits of states in an adapter's own precision."""
        logits: Tensor = self.lm_head(hidden.to(self.embedding.dtype))
        return logits


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


def _for(adapter: Adapter, states: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """States of a model as an adapter takes them, and where."""
    like = next(adapter.parameters())
    return states.to(like.device, like.dtype)


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
    return tables.choose(out[0])


@runtime_checkable
class Head(Protocol):
    """Drafts in decode: an adapter (``HeadDrafter``) or a control."""

    reads_drafter: bool
    """Whether ``begin`` needs a reader."""

    def begin(
        self, question: str, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None
    ) -> None:
        """A sample begins."""

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        """What follows ``tokens``, at most ``gamma`` deep; states of the last m of them."""


class Draws:
    """Random numbers that the drafts of an answer are drawn with.

    They are not the verifier's: a draft must not know what it will be held against. They are no
    other answer's: of answers that share their drafts each follows the verifier, over all seeds,
    but together they do not. And they begin anew in every cycle, so that how much was drawn before,
    and for whom, changes nothing.
    """

    def __init__(self, seed: int, device: torch.device, name: str | None = None) -> None:
        self.name = name
        """The answer's, as in ``Engine.name_draws``."""
        self._seed = seed
        self._generator = torch.Generator(device)

    def behind(self, num_said: int) -> torch.Generator:
        """Those of the cycle that begins behind so many tokens."""
        seed = random.Random(f"drafts {self._seed} {num_said} {self.name}").getrandbits(32)
        return self._generator.manual_seed(seed)


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How a head drafts."""

    tree_width: int = 0
    """Branches a node and nodes a level of a draft tree; 0: chains."""
    tree_nodes: int = 12
    """Largest tree that is verified."""
    sampling: Sampling | None = None
    """Draw the drafts of a chain like this; None: take the likeliest."""
    draws: Draws | None = None
    """What to draw them with: the engine's (``Engine.draft_draws``), which names every answer."""


class HeadDrafter:
    """A head on the verifier's states: a few rows in, a chain or a tree of drafts out."""

    def __init__(
        self,
        head: Adapter,
        tables: VerifierTables,
        max_new_tokens: int,
        options: HeadOptions | None = None,
        policy: Policy | None = None,
    ) -> None:
        """
        Raises:
            XsdError: the tree is too wide for the head.
        """
        self.head = head
        self.tables = tables
        self.options = options or HeadOptions()
        self.policy = policy or Policy()
        self.max_length = max_new_tokens + MAX_GAMMA * max(1, self.options.tree_width)
        row = head.row
        self._reads_verifier = "verifier" in row.streams
        self._reads_token = "token" in row.streams
        self.reads_drafter = "drafter" in row.streams
        # E2 attends to e[<= t + 1]: the drafter has read the token just chosen.
        self._ahead = 1 if head.memory == "drafter" else 0
        self._kept: AdapterCache | CompiledCache | None = None
        self._check_tree()
        drawn = self.options.sampling is not None
        assert drawn == (self.options.draws is not None), "drawing takes random numbers"
        self._tokens = tables.embedding
        self._is_read = self._reads_token and self._tokens.nbytes <= READ_TOKENS_BYTES
        if self._is_read:
            with torch.no_grad():
                self._tokens = head.read_tokens(_for(head, self._tokens))

    @torch.inference_mode()
    def begin(
        self, question: str, visual: Float[Tensor, "K Dv"] | None, reader: DrafterReader | None
    ) -> None:
        """Start a sample; ``visual`` and ``reader`` only where the level's row asks for them."""
        visual = None if visual is None else _for(self.head, visual[None])
        if self._kept is None:
            self._kept = self.head.new_cache(1, self.max_length, visual)
        else:
            self._kept.begin_sample(visual)
        self._reader = reader

    def _check_tree(self) -> None:
        """Raise XsdError where only a narrower tree would fit the head's learned positions."""
        width, num_positions = self.options.tree_width, self.head.config.max_positions
        num_said = self.max_length - MAX_GAMMA * max(1, width)
        fits = (num_positions - num_said) // MAX_GAMMA
        if width > fits >= 1:
            raise XsdError(
                f"tree_width={width}: {MAX_GAMMA} levels of {width} nodes behind {num_said} tokens "
                f"exceed the head's max_positions={num_positions}; tree_width may be 1 to {fits}"
            )

    @torch.inference_mode()
    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        """Draft what follows ``tokens``, at most ``gamma`` deep.

        Args:
            tokens: everything said so far, ``y[0..t]``.
            states: the verifier's states of the last ``m`` of them, ``v[t-m+1..t]``; earlier rows
                came in earlier cycles.
        """
        sequence = list(tokens)
        start = len(sequence) - states.shape[0]
        self._cache.length = start
        if self.vocabulary is not None and isinstance(self._cache, CompiledCache):
            if not self.reads_drafter:
                return self._compiled(self._cache, sequence[start:], states, gamma)
            reader = self._reader
            if reader is not None and reader.is_compiled and not self.options.tree_width:
                states = states if self._reads_verifier else torch.zeros_like(states)
                depth = self.policy.blind_depth(gamma)
                found, sure = reader.draft_coupled(
                    self._cache, sequence, start, states, depth, self.vocabulary, shift=1
                )
                return Draft(found, confidence=sure)
        out = self._step(sequence, start, len(sequence), _for(self.head, states[None]))[:, -1:]
        if self.options.tree_width:
            return self._grow_tree(len(sequence), out, gamma)
        return self._extend_chain(sequence, out, gamma)

    def unread(
        self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int
    ) -> Unread | None:
        """``propose`` that leaves the draft on the device; None: drafts are made step by step."""
        return None

    def shape(self, gamma: int) -> Shape:
        """How large a draft of so many levels may be."""
        options, asks = self.options, self.policy.asks_confidence
        if options.tree_width:
            return Shape(gamma, options.tree_width, options.tree_nodes)
        return Shape(gamma, is_sure=not asks)

    def _compiled(self, cache: CompiledCache, said: list[int], states: Tensor, gamma: int) -> Draft:
        assert self.vocabulary is not None
        shape = self.shape(gamma)
        states = states if self._reads_verifier else torch.zeros_like(states)
        found = cache.draft(said, states, self.vocabulary, shape, self.policy.rule)
        return Draft(
            found.tokens.tolist(),
            found.parents.tolist() if shape.width > 1 else None,
            None,
            None if shape.is_sure else found.confidence.tolist(),
            found.num_levels,
        )

    def _extend_chain(self, sequence: list[int], out: Tensor, gamma: int) -> Draft:
        end = len(sequence)
        draws = None if self.options.draws is None else self.options.draws.behind(end)
        confidence: list[float] = []
        rows: list[Tensor] = []
        joint = 1.0
        while True:
            token, sure, q = self._guess(out, draws)
            sequence.append(token)
            confidence.append(sure)
            if q is not None:
                rows.append(q)
            joint *= self.policy.chance(sure)
            drafted = len(sequence) - end
            if drafted == gamma or token in self.tables.eos_ids:
                break
            if not self.policy.go_on(joint, drafted):
                break
            out = self._step(sequence, end + drafted - 1, end + drafted, out)
        return Draft(
            sequence[end:],
            None,
            torch.stack(rows) if rows else None,
            confidence if self.policy.asks_confidence else None,
        )

    def _guess(
        self, out: Float[Tensor, "1 1 Dv"], draws: torch.Generator | None
    ) -> tuple[int, float, Tensor | None]:
        """A token, how probable it is, and what it was drawn from (None: it is the likeliest)."""
        sampling = self.options.sampling
        if sampling is None and not self.policy.asks_confidence:
            return self.tables.choose(out)[0], 1.0, None
        logits = self.tables.score(out)[0, 0]
        if sampling is not None:
            q = sampling.probabilities(logits)
            token = draw(q, draws)
            return token, float(q[token]), q
        best, index = torch.softmax(logits, -1).max(-1)
        return int(index), float(best), None

    def _grow_tree(self, base: int, out: Tensor, gamma: int) -> Draft:
        """Level by level the likeliest nodes branch; of all, the likeliest are kept (EAGLE-2,
        arXiv:2406.16858). The head's rows of one level are one pass."""
        tree = _Tree(base)
        width, policy = self.options.tree_width, self.policy
        frontier = [-1]
        for depth in range(1, gamma + 1):
            best, ids = torch.softmax(self.tables.score(out)[0], -1).topk(width)
            new = tree.branch(frontier, best.tolist(), ids.tolist(), policy)
            open_ = [i for i in new if tree.tokens[i] not in self.tables.eos_ids]
            rows = tree.best(open_, width)
            rows = list(takewhile(partial(tree.goes_on, policy), rows))
            if depth == gamma or not rows:
                break
            states = out[:, [frontier.index(tree.parents[i]) for i in rows]]
            inputs = StepInputs(
                None,
                states if self._reads_verifier else None,
                self._token_rows([tree.tokens[i] for i in rows]),
            )
            visible = tree.visible(rows, self._cache.length).to(states.device)
            out = self.head.step(inputs, self._cache, Siblings(base + depth - 1, visible))
            frontier = rows
        return tree.draft(self.options.tree_nodes, depth)

    def _step(
        self, sequence: list[int], start: int, stop: int, states: Float[Tensor, "1 m Dv"]
    ) -> Float[Tensor, "1 m Dv"]:
        drafter = None
        if self.reads_drafter:
            assert self._reader is not None
            first = 0 if start == 0 else start + self._ahead
            read = self._reader.states(sequence, first, stop + self._ahead)
            drafter = _for(self.head, read[None])
        token = self._token_rows(sequence[start:stop]) if self._reads_token else None
        verifier = states if self._reads_verifier else None
        return self.head.step(StepInputs(drafter, verifier, token), self._cache)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """For drafts that are compiled; None: they cannot be, or are drawn."""
        knows = self._is_read or not self._reads_token
        if not knows or self.options.sampling is not None:
            return None
        return self.tables.vocabulary(self._tokens if self._is_read else None)

    @property
    def compiled(self) -> CompiledCache | None:
        """The rows of the sample that has begun, where whole cycles can be compiled."""
        can = self.vocabulary is not None and not self.reads_drafter
        return self._cache if can and isinstance(self._cache, CompiledCache) else None

    def timed_draft(self, gamma: int, num_new: int = 4) -> Callable[[], object]:
        """A draft of all of ``gamma`` levels behind so many new tokens, to be timed; a sample must
        have begun, and its next cycle does not see it."""
        cache, vocabulary = self.compiled, self.vocabulary
        assert cache is not None and vocabulary is not None
        endless = replace(vocabulary, eos=vocabulary.eos[:0])
        shape = replace(self.shape(gamma), is_sure=False)
        states = torch.zeros(num_new, cache.head.width)
        cache.length = 0
        ids, shares = np.empty((2, shape.num_guesses), np.int64), np.empty((2, shape.num_guesses))
        arrays = (*ids, *shares)
        return cache.drafting([0] * num_new, states, endless, shape, Policy.rule, arrays)

    @property
    def _cache(self) -> AdapterCache | CompiledCache:
        assert self._kept is not None, "propose comes after begin"
        return self._kept

    def _token_rows(self, ids: list[int]) -> Float[Tensor, "1 R Dv"]:
        """What the head reads of these tokens."""
        # One is the common case, and a slice is cheaper than a gather.
        rows = self._tokens.narrow(0, ids[0], 1) if len(ids) == 1 else self._tokens[ids]
        return (rows if self._is_read else self.head.read_tokens(_for(self.head, rows)))[None]


class _Tree:
    """A draft tree while it grows; nodes are numbered as they come, parents first."""

    def __init__(self, base: int) -> None:
        self.base = base
        """Head rows before the tree's."""
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.confidence: list[float] = []
        self.joint: list[float] = []
        self._slots: dict[int, int] = {}
        """Nodes that the head has read, and which of its rows they are."""

    def branch(
        self,
        frontier: list[int],
        confidence: list[list[float]],
        tokens: list[list[int]],
        policy: Policy,
    ) -> list[int]:
        """Give every node of the frontier its likeliest followers; their numbers."""
        first = len(self.tokens)
        for parent, sure, ids in zip(frontier, confidence, tokens, strict=True):
            before = 1.0 if parent == -1 else self.joint[parent]
            self.parents += [parent] * len(ids)
            self.tokens += ids
            self.confidence += sure
            self.joint += [before * policy.chance(p) for p in sure]
        return list(range(first, len(self.tokens)))

    def best(self, nodes: list[int], size: int) -> list[int]:
        return sorted(nodes, key=lambda i: -self.joint[i])[:size]

    def goes_on(self, policy: Policy, node: int) -> bool:
        # What is likelier is verified first.
        rank = sum(joint >= self.joint[node] for joint in self.joint)
        return policy.go_on(self.joint[node], rank)

    def visible(self, rows: list[int], length: int) -> Bool[Tensor, "R end"]:
        """Cached rows that each of ``rows`` follows, appended to ``length`` others."""
        for slot, node in enumerate(rows, start=length):
            self._slots[node] = slot
        visible = torch.zeros(len(rows), length + len(rows), dtype=torch.bool)
        visible[:, : self.base] = True
        for row, node in enumerate(rows):
            while node != -1:
                visible[row, self._slots[node]] = True
                node = self.parents[node]
        return visible

    def draft(self, size: int, num_levels: int) -> Draft:
        """The likeliest ``size`` nodes; a node is no likelier than its parent, so they connect."""
        kept = self.best(list(range(len(self.tokens))), size)
        confidence = [self.confidence[node] for node in kept]
        draft = subtree(self.tokens, self.parents, kept)
        return replace(draft, confidence=confidence, num_levels=num_levels)


def subtree(tokens: Sequence[int], parents: Sequence[int], kept: Sequence[int]) -> Draft:
    """The nodes ``kept``, each behind its parent, as a draft."""
    number = {-1: -1} | {node: i for i, node in enumerate(kept)}
    return Draft([tokens[node] for node in kept], [number[parents[node]] for node in kept])

"""Cycles of decoding in single precision on a CPU: many of them, or one, in a compiled call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xsd import kernels
from xsd.decoding.accept import Draft
from xsd.decoding.decoded import DRAFTING, LM_HEAD, PASSES
from xsd.decoding.draft import HeadDrafter
from xsd.decoding.policy import Policy
from xsd.kernels import PANEL
from xsd.pairs.base import Decoder
from xsd.pairs.cache import KVCache
from xsd.pairs.choose import Chooser
from xsd.pairs.compiled import CompiledLayers


def begun_head(party: object) -> HeadDrafter | None:
    """The party's head, where cycles with it can be compiled."""
    # What a protocol's own check takes is a fifth of a pass.
    found: HeadDrafter | None = getattr(party, "begun_head", _nobody)()
    return found


def _nobody() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Cycles:
    """What became of some cycles."""

    drafted: list[int]
    """Of every one that had drafts, how many were verified."""
    accepted: list[int]
    states: Float[Tensor, "n Dv"]
    """That predicted the tokens said."""


class CompiledLoop:
    """The verifier's part of a cycle, and a head's, as kernels take them."""

    @classmethod
    def of(cls, verifier: Decoder, cache: KVCache, max_new_tokens: int) -> CompiledLoop | None:
        """None: the verifier's passes are not compiled, from token ids to choices."""
        layers: CompiledLayers | None = getattr(verifier.stack, "compiled", None)
        table = verifier.embedding
        if layers is None or table.dtype != torch.float32 or not table.is_contiguous():
            return None
        panels = Chooser(verifier.lm_head).panels
        return None if panels is None else cls(verifier, layers, panels, cache, max_new_tokens)

    def __init__(
        self,
        verifier: Decoder,
        layers: CompiledLayers,
        panels: np.ndarray,
        cache: KVCache,
        max_new_tokens: int,
    ) -> None:
        self._verifier = (*layers.weights, layers.final_norm, layers.eps, *layers.rotation)
        self._cache = cache
        # A tensor, not an array: it may move, to where a drafter's process sees it.
        self._table, self._width = verifier.embedding, verifier.width
        self._panels, self._num_ids = panels, verifier.vocab_size
        self._eos = np.array(sorted(verifier.eos_ids), np.int64)
        self._tokens = np.zeros(max_new_tokens, np.int64)
        self._counts = np.zeros((2, max_new_tokens), np.int64)
        self._spent = np.zeros(4, np.int64)
        self._no_head = _no_head(verifier.width)
        self.parts: dict[str, float] = {}
        """Milliseconds of the last call, by part."""

    def run(
        self,
        tokens: list[int],
        states: Float[Tensor, "m Dv"] | None = None,
        head: HeadDrafter | None = None,
        gamma: int = 0,
        policy: Policy | None = None,
        num_calls: int = 1 << 30,
    ) -> Cycles:
        """Decode on to the end, or for so many passes; ``tokens`` grow.

        Args:
            states: that predicted the tokens said; only a head looks at them.
            policy: that a head's drafts follow; None: the fixed one.
        """
        num_said, limit = len(tokens), len(self._tokens)
        seen = np.empty((limit + 1, self._width), np.float32)
        self._tokens[:num_said] = tokens
        at = np.array([num_said, self._cache.length, 0, 0, 0])
        rule = Policy.rule if policy is None else policy.rule
        if head is None:
            party, shape = self._no_head, (0, 1, 0, True)
        else:
            assert states is not None
            seen[:num_said] = states.numpy()
            past, vocabulary = head.compiled, head.vocabulary
            assert past is not None and vocabulary is not None and len(states) == num_said
            party = past.head.arguments, past.past, past.words(vocabulary)
            shape = head.shape(gamma).arguments
        self._spent[:] = 0
        began = time.perf_counter_ns()
        kernels.speak(
            self._verifier, *self._cache.arrays, self._table.numpy(), self._panels, self._num_ids,
            self._eos, *party, rule, *shape, num_calls, self._tokens, seen, at,
            *self._counts, self._spent,
        )  # fmt: skip
        self._share_out(began)
        end, self._cache.length, _, num_cycles, _ = at.tolist()
        tokens[num_said:] = self._tokens[num_said:end].tolist()
        drafted, accepted = self._counts[:, :num_cycles].tolist()
        return Cycles(drafted, accepted, torch.from_numpy(seen[num_said:end]))

    def verify(self, last: int, draft: Draft) -> tuple[list[int], int, Float[Tensor, "n Dv"]]:
        """One pass over the last token and a draft behind it.

        Returns the drafted tokens that hold, the verifier's own behind them, and the states that
        predicted those and it.
        """
        size = len(draft)
        states = np.empty((size + 1, self._width), np.float32)
        path = np.empty(size, np.int64)
        self._spent[:] = 0
        began = time.perf_counter_ns()
        held, token = self._pass(last, draft, states, path)()
        self._share_out(began)
        self._cache.length += 1 + held
        return path[:held].tolist(), token, torch.from_numpy(states[: held + 1])

    def timed_pass(self, num_rows: int) -> Callable[[], object]:
        """A pass of so many rows behind the cache, to be timed; the cache stays as it is."""
        states = np.empty((num_rows, self._width), np.float32)
        return self._pass(0, Draft([0] * (num_rows - 1)), states, np.empty(num_rows - 1, np.int64))

    def _pass(
        self, last: int, draft: Draft, states: np.ndarray, path: np.ndarray
    ) -> Callable[[], tuple[int, int]]:
        size, start = len(draft), self._cache.length
        self._cache.check_room(size + 1)
        parents = draft.parents if draft.parents is not None else range(-1, size - 1)
        return partial(
            kernels.verify, self._verifier, *self._cache.arrays, self._table.numpy(), self._panels,
            self._num_ids, last, np.array(draft.tokens, np.int64), np.array(parents, np.int64),
            start, states, np.empty(size + 1, np.int64), path,
            self._spent,
        )  # fmt: skip

    def _share_out(self, began: int) -> None:
        """What the kernel's ticks say of the time since then, by the clock of ``perf_counter``."""
        spent_ms = (time.perf_counter_ns() - began) / 1e6
        drafting, reading, choosing, whole = self._spent.tolist()
        # A single pass has no more to it; a machine without a counter tells nothing apart.
        per_tick = spent_ms / (whole or reading + choosing or 1)
        self.parts = {DRAFTING: drafting * per_tick, LM_HEAD: choosing * per_tick}
        self.parts[PASSES] = reading * per_tick if reading else spent_ms


def _no_head(width: int) -> tuple[tuple[object, ...], ...]:
    """What stands in for a head's arguments where nobody looks at them: the kinds must be right."""
    weight, layers = np.zeros((0, 0, PANEL), np.uint32), np.zeros((1, 0, 0, PANEL), np.uint32)
    bias, biases = np.zeros(0, np.float32), np.zeros((1, 0), np.float32)
    head = (weight, *[layers] * 6, weight, *[biases] * 6, bias, np.float32(0), False, np.float32(0))
    row = np.zeros((1, 1, 1, 1, PANEL), np.float32)
    return (
        head,
        (row, row, row, row, 0),
        (np.zeros((0, width), np.float32),) * 2
        + (
            weight,
            0,
            np.zeros(0, np.int64),
        ),
    )

"""Real overlap on GPUs: the drafter in a thread, on a stream of its own, on one device or two.

On one device both models' kernels share it; the host's waits for one leave the interpreter to the
other. ``overlap`` is the same for CPUs, where two models in one interpreter would only hinder each
other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Event, Thread

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.clock import Stopwatch
from xsd.decoding.accept import Draft
from xsd.decoding.ahead import Board
from xsd.decoding.speculator import LocalSpeculator
from xsd.decoding.strategies import goes_on
from xsd.decoding.unread import Unread
from xsd.pairs.base import Media
from xsd.types import Span


class StreamSpeculator:
    """A ``LocalSpeculator`` that works beside the verifier until it is asked for its drafts."""

    def __init__(self, local: LocalSpeculator, device: torch.device) -> None:
        """``device``: where the drafter lies."""
        self._local = local
        self._device = device
        # The verifier's prefill fills a GPU for its whole time: at the same priority the drafter's
        # kernels would wait until it ends, and nothing would be drafted in the gap.
        self._stream = torch.cuda.Stream(device, -1) if device.type == "cuda" else None
        self.wants_projected = local.wants_projected
        self.wants_prefilled = local.wants_prefilled
        self._thread: Thread | None = None
        self._goes_on = goes_on(local.strategy)
        self._board = Board.of_threads(local.max_new_tokens)

    def start(self, media: Media, question: str, watch: Stopwatch) -> None:
        self._stop, self._seen = Event(), Event()
        self._board.begin()
        self._visual: Tensor | None = None
        self._prefilled: Tensor | None = None
        self._found: list[int] = []
        self._spans: list[Span] = []
        self._error: Exception | None = None
        self._follow_caller()
        self._thread = Thread(
            target=self._work, args=(media, question, watch), name="xsd-drafter", daemon=True
        )
        self._thread.start()

    def on_projected(self, visual: Float[Tensor, "K Dv"]) -> None:
        # Kept here too, so that its memory is nobody else's while the thread reads it.
        # Copied here, before the prefill is launched: a copy to another GPU waits for its source's.
        self._visual = visual.to(self._device, non_blocking=True)
        self._follow_caller()
        self._seen.set()

    def on_prefilled(self, visual: Float[Tensor, "K Dv"]) -> None:
        self._prefilled = visual

    def gap_drafts(self) -> Draft:
        """What is ready at this moment; nobody waits for another token.

        Free-running states still have to pass the adapter: that one pass is waited for.
        """
        if self._goes_on:
            return Draft(self._board.drafts(self._local.max_gap_drafts))
        self._stop.set()
        self._seen.set()
        strategy = self._local.strategy
        if strategy.gap is None:
            return Draft([])
        if strategy.gap_mode == "free" and self._local.gap_adapter is not None:
            self._join()
        with torch.inference_mode():
            return self._local.finish_gap(list(self._found))

    def propose(self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int) -> Draft:
        if self._goes_on:
            self._board.tell(tokens)
            while not self._board.is_current:
                time.sleep(0)
                if self._error is not None:
                    raise self._error
            return Draft(self._board.drafts(gamma))
        self._end()
        return self._local.propose(tokens, states, gamma)

    def unread(
        self, tokens: Sequence[int], states: Float[Tensor, "m Dv"], gamma: int
    ) -> Unread | None:
        if self._goes_on:
            return None
        self._end()
        return self._local.unread(tokens, states, gamma)

    def finish(self) -> list[Span]:
        self._end()
        return [*self._local.finish(), *self._spans]

    def _work(self, media: Media, question: str, watch: Stopwatch) -> None:
        try:
            # On another GPU the verifier's own stream would be waited for.
            watch = watch.on(self._device)
            with torch.inference_mode(), self._on_stream():
                self._local.start(media, question, watch)
                if self._local.strategy.gap is not None:
                    self._draft(watch)
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error

    def _draft(self, watch: Stopwatch) -> None:
        if self.wants_projected:
            self._seen.wait()
            if self._visual is None:
                return
            self._local.on_projected(self._visual)
        began_ms = watch.ms()
        if self._goes_on:
            self._go_on()
        elif not self._stop.is_set():
            for token in self._local.gap_tokens():
                self._found.append(token)
                if self._stop.is_set():
                    break
        self._spans.append(Span("drafter", "draft", began_ms, watch.ms()))

    def _go_on(self) -> None:
        self._board.draft(
            self._local.begin_coupled(),
            first=self._local.max_gap_drafts,
            ahead=2 * self._local.strategy.gamma + 1,
            is_over=self._stop.is_set,
            # It is ahead as far as it may be: the interpreter is the verifier's meanwhile.
            pause=lambda: time.sleep(2e-5),
        )

    def _end(self) -> None:
        """The gap is over: what the thread has done may be read here."""
        if self._thread is not None:
            self._stop.set()
            self._seen.set()
            self._join()
        if self._prefilled is not None:
            self._local.on_prefilled(self._prefilled)
            self._prefilled = None

    def _join(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if self._error is not None:
            raise self._error

    def _follow_caller(self) -> None:
        """What the caller's stream has been given so far comes first."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

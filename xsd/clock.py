"""The stopwatch of every measurement: wall time, after the device has finished."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class Stopwatch:
    """Milliseconds since it was started; waits for what the caller's stream has been given before
    it reads the clock.

    The underlying clock is the machine's monotonic one, so that readings of several processes
    can be laid on one timeline through ``origin_ns``.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._synchronize()
        self.origin_ns = time.monotonic_ns()

    def on(self, device: torch.device) -> Stopwatch:
        """The same clock for who works on another device: it waits for that one's stream."""
        twin = copy.copy(self)
        twin._cuda = device if device.type == "cuda" else None
        return twin

    def ms(self) -> float:
        self._synchronize()
        return (time.monotonic_ns() - self.origin_ns) / 1e6

    def _synchronize(self) -> None:
        if self._cuda is not None:
            torch.cuda.current_stream(self._cuda).synchronize()


class Mark:
    """A moment in the work that the caller's stream has been given; nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._ns = time.monotonic_ns()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def ms_since(self, earlier: Mark) -> float:
        """Milliseconds of the device between two moments, both of which have come to pass."""
        if self._event is None or earlier._event is None:
            return (self._ns - earlier._ns) / 1e6
        ms: float = earlier._event.elapsed_time(self._event)
        return ms


class Laps:
    """Milliseconds of one piece of work by parts, which add up to all of it.

    By the caller's clock: on a GPU a part ends when the caller has got past it, so what it left
    running counts where somebody waits for it.
    """

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._last = time.monotonic_ns()

    def lap(self, part: str, within: Mapping[str, float] | None = None) -> float:
        """What went by since the last lap was ``part``; the milliseconds of it.

        Args:
            within: of other parts in it, taken off.
        """
        now = time.monotonic_ns()
        spent_ms, self._last = (now - self._last) / 1e6, now
        inner = within or {}
        for name, ms in {**inner, part: spent_ms - sum(inner.values())}.items():
            self.ms[name] = self.ms.get(name, 0.0) + ms
        return spent_ms


class PartTimes:
    """Seconds that each part of some work took, added up; waits for the device at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.is_on = True
        """Off, nothing is timed and nobody waits."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.is_on:
            yield
            return
        watch = Stopwatch(self._device)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + watch.ms() / 1e3


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warmup: int = 2,
    settle: int = 0,
) -> dict[str, list[float]]:
    """Milliseconds of every task, ``repeats`` times, in rounds of a random order.

    So whatever the machine does meanwhile touches all of them alike. Before each timing the task
    runs ``settle`` times untimed: what follows its like in use finds its weights in the caches.
    """
    order = list(tasks)
    for name in order * warmup:
        tasks[name]()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    shuffle = random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            for _ in range(settle):
                tasks[name]()
            watch = Stopwatch(device)
            tasks[name]()
            times[name].append(watch.ms())
    return times

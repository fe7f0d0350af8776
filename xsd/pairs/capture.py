"""Work that a GPU repeats: captured once as a CUDA graph, then launched by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Made:
    """How many captures this process has made: who times work leaves out what made one."""

    count = 0


class Lane:
    """Where captures that never run at once are made: they share their scratch memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # A pool whose last graph is gone takes no other: this one stays.
        self._first = Capture(lambda: torch.zeros(1, device=device), self)


class Capture(Generic[T]):
    """Work on fixed buffers, launched as one CUDA graph; ``result`` is overwritten every time."""

    def __init__(self, work: Callable[[], T], lane: Lane) -> None:
        """``work`` runs once here, so that what its first run allocates and compiles exists."""
        Made.count += 1
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(lane.device)
        lane.stream.wait_stream(current)
        with torch.cuda.stream(lane.stream):
            work()
            lane.stream.synchronize()
            # Other threads may go on allocating.
            self._graph.capture_begin(pool=lane.pool, capture_error_mode="thread_local")
            try:
                self.result = work()
            finally:
                self._graph.capture_end()
        current.wait_stream(lane.stream)

    def replay(self) -> T:
        self._graph.replay()
        return self.result


class Again:
    """A function of one tensor; on a GPU, captured for shapes that come a second time.

    What comes once is not worth a capture. The result is the caller's to keep.
    """

    MAX_SHAPES = 8

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._seen: set[object] = set()
        self._captured: dict[object, tuple[Tensor, Capture[Tensor]]] = {}
        self._lane: Lane | None = None

    def __call__(self, given: Tensor) -> Tensor:
        kind = (given.shape, given.dtype, given.device)
        found = self._captured.get(kind)
        if found is None:
            is_new = kind not in self._seen or len(self._captured) == self.MAX_SHAPES
            if given.device.type != "cuda" or is_new:
                if len(self._seen) < 64 * self.MAX_SHAPES:
                    self._seen.add(kind)
                return self._function(given)
            self._lane = self._lane or Lane(given.device)
            buffer = given.clone()
            found = buffer, Capture(lambda: self._function(buffer), self._lane)
            self._captured[kind] = found
        buffer, capture = found
        buffer.copy_(given)
        return capture.replay().clone()

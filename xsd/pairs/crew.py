"""Cores that share out the images of a clip."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise


class Crew:
    """Threads for kernels that need nothing of each other."""

    num_cores = 1

    def __init__(self) -> None:
        self._threads: list[ThreadPoolExecutor] = []

    def share_out(self, num_items: int, work: Callable[[slice], None]) -> None:
        """Give every core about as many neighbouring items; returns when all are done."""
        num_shares = max(1, min(self.num_cores, num_items))
        bounds = [num_items * i // num_shares for i in range(num_shares + 1)]
        first, *others = (slice(*ends) for ends in pairwise(bounds))
        while len(self._threads) < len(others):
            self._threads.append(ThreadPoolExecutor(1, "xsd-images"))
        waiting = [
            thread.submit(work, share) for thread, share in zip(self._threads, others, strict=False)
        ]
        work(first)
        for done in waiting:
            done.result()

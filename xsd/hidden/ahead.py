"""Work that goes on in the background while its last result is being used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], depth: int = 1) -> Iterator[T]:
    """The same items, the next ``depth`` of them made by a thread meanwhile.

    What the iterator raises is raised where its item would have come.
    """
    end: object = object()
    with ThreadPoolExecutor(1, "xsd-ahead") as thread:
        try:
            waiting = deque(thread.submit(next, items, end) for _ in range(depth))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            # An abandoned iteration waits for nothing that was not begun.
            thread.shutdown(wait=False, cancel_futures=True)

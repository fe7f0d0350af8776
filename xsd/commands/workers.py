"""Processes beside ``main`` for work that is independent: adapters, each on its share of the cores.

A model as small as an adapter gains little from a second thread, and threads that wait for each
other spin, so a busy machine makes them many times slower. Processes of their own do neither.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any, TypeVar

from xsd.errors import XsdError

T = TypeVar("T")

_IMPORTED_ONCE = ("mlflow", "xsd.bench", "xsd.commands.offline", "xsd.plots.learning")
"""What takes seconds to import: a server of processes does it, once, while ``main`` works."""
_GRACE_SECONDS = 30.0
_stopping: Event | None = None
"""In a worker: set when no further work is to be begun."""


class _Inline(Executor):
    """What is submitted is done at once, in this process."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@contextmanager
def workers(num_workers: int, parent: str) -> Iterator[Executor]:
    """Lend an executor whose stages are children of run ``parent``; 1: no process is started.

    Leaving by an exception (Ctrl-C and SIGTERM are such) ends the workers, and their runs are
    KILLED; so it is if this process is gone without a word.

    Raises:
        XsdError: a worker died.
    """
    if num_workers == 1:
        yield _Inline()
        return
    import torch

    from xsd.tracking import store

    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    torch.set_num_threads(num_threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED_ONCE))
    forkserver.ensure_running()
    stopping = context.Event()
    told = (store.tracking_uri(), parent, num_threads, stopping)
    with ProcessPoolExecutor(num_workers, context, _begin, told) as pool:
        try:
            yield _Interruptible(pool)
        except BaseException as error:
            stopping.set()
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise XsdError(
                    "a worker process died, perhaps for want of memory; try --num_workers 1"
                ) from error
            raise


class _Interruptible(Executor):
    """Hands work on so that SIGTERM ends it, but not the worker, which has a status to write."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return self._pool.submit(_interruptible, fn, *args, **kwargs)


def _interruptible(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    # What the pool had handed out already when it was told to stop.
    if _stopping is not None and _stopping.is_set():
        raise CancelledError
    signal.signal(signal.SIGTERM, _leave)
    try:
        return fn(*args, **kwargs)
    except SystemExit:
        # Not to be sent to the owner as it is: it asked for it.
        raise CancelledError from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _begin(tracking_uri: str, parent: str, num_threads: int, stopping: Event) -> None:
    """In a new worker: whose child it is, its threads, and whom it listens to."""
    global _stopping
    import torch

    from xsd.tracking.run import join

    # Ctrl-C reaches the whole group; the owner tells its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _stopping = stopping
    threading.Thread(target=_follow_the_owner, daemon=True).start()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(num_threads)
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    join(parent)


def _follow_the_owner() -> None:
    owner = multiprocessing.parent_process()
    assert owner is not None and _stopping is not None, "this is a worker"
    connection.wait([owner.sentinel])
    _stopping.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)

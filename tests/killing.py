"""SIGKILL at random moments, until a process comes to its end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable

LONGEST = 120.0
"""Seconds that a process is spared at last; who needs more waits for something that never comes."""


def kill_until_done(
    target: Callable[..., None], *args: object, draw: random.Random, growth: float = 1.3
) -> int:
    """Start ``target`` in a forked process again and again; how many of them were killed.

    Each is spared for longer than the one before, so that however slow the machine is, one ends.
    """
    fork = multiprocessing.get_context("fork")
    deaths, spared = 0, 0.05
    while True:
        assert spared < LONGEST, f"{deaths} processes were killed, and none came to its end"
        child = fork.Process(target=target, args=args)
        child.start()
        child.join(timeout=draw.uniform(0.0, spared))
        if child.exitcode is None:
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
        if child.exitcode == 0:
            return deaths
        assert child.exitcode == -signal.SIGKILL, f"it ended by itself, with {child.exitcode}"
        deaths += 1
        spared *= growth

"""The stopwatch of every measurement: wall time, after the device has finished."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Milliseconds since it was started; waits for the device before it reads the clock.

    The underlying clock is the machine's monotonic one, so that readings of several processes
    can be laid on one timeline through ``origin_ns``.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._synchronize()
        self.origin_ns = time.monotonic_ns()

    def ms(self) -> float:
        self._synchronize()
        return (time.monotonic_ns() - self.origin_ns) / 1e6

    def _synchronize(self) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)

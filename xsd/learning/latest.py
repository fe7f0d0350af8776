"""The state after the latest step, for a process that is killed: kept in memory of the machine.

Two files, mapped into memory and written over in turn, so that one is always whole. Nobody waits
for the disk: a copy takes a few ms, and what a killed process wrote is there for the next one. It
does not outlive the machine, and so is read only where this is still running; for all else there
is the state on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xsd.errors import XsdError
from xsd.learning.state import FitState, read_state, write_state

_PROGRESS, _NUM_BYTES = "progress", 512
_SINCE_START = Path("/proc/sys/kernel/random/boot_id")


class Latest:
    """Keeps the state of one training beside the file ``state``."""

    def __init__(self, state: Path, key: str) -> None:
        self._paths, self._key = _paths(state), key
        self._mapped: list[dict[str, Tensor]] = []
        self._turn = 0

    @staticmethod
    def is_possible() -> bool:
        """Whether a machine that was started anew can be told here: on Linux."""
        return _SINCE_START.is_file()

    def put(self, progress: FitState, tensors: Mapping[str, Tensor]) -> None:
        """Copy; the tensors are on the host, and the same ones every time.

        Raises:
            OSError: no room for the two files.
        """
        if not self._mapped:
            self._mapped = [self._make(path, tensors) for path in self._paths]
        mapped = self._mapped[self._turn]
        # What is being written over is no state, until all of it is there.
        mapped[_PROGRESS].zero_()
        for name, tensor in tensors.items():
            mapped[name].copy_(tensor)
        text = json.dumps(asdict(progress)).encode().ljust(_NUM_BYTES)
        mapped[_PROGRESS].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._turn = 1 - self._turn

    def _make(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        empty = {_PROGRESS: torch.zeros(_NUM_BYTES, dtype=torch.uint8)}
        write_state(path, {}, {**tensors, **empty}, _key(self._key), durable=False)
        return _mapped(path)


def settle(state: Path, key: str) -> None:
    """Write the latest state that a killed process left to ``state``, unless that is as new; the
    files of ``Latest`` go."""
    write_if_newer(
        state, key, [read for path in _paths(state) if (read := _read(path, key)) is not None]
    )
    for path in _paths(state):
        path.unlink(missing_ok=True)


def write_if_newer(
    state: Path, key: str, found: Sequence[tuple[FitState, Mapping[str, Tensor]]]
) -> None:
    """Write the newest of what was found to ``state``, unless that is as new."""
    if not found:
        return
    progress, tensors = max(found, key=lambda read: _age(read[0]))
    on_disk: FitState | None = None
    if state.exists():
        on_disk = FitState(**read_state(state, key)[0])
    if on_disk is None or _age(on_disk) < _age(progress):
        write_state(state, asdict(progress), tensors, key)


def _age(progress: FitState) -> tuple[int, int]:
    return progress.epoch, progress.step


def _paths(state: Path) -> list[Path]:
    return [state.with_name(f"{state.stem}.latest{number}{state.suffix}") for number in (0, 1)]


def _key(key: str) -> str:
    """Of a configuration, and of the time since this machine was started."""
    return f"{key} {_SINCE_START.read_text().strip()}"


def _read(path: Path, key: str) -> tuple[FitState, dict[str, Tensor]] | None:
    """A whole state, or None."""
    if not (path.is_file() and Latest.is_possible()):
        return None
    try:
        _, tensors = read_state(path, _key(key))
        return FitState(**json.loads(bytes(tensors.pop(_PROGRESS).numpy()))), tensors
    except (XsdError, ValueError, KeyError, TypeError):
        return None


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, to be written to in place."""
    data = np.memmap(path, dtype=np.uint8, mode="r+")
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:begin].tobytes())
    mapped = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (begin + offset for offset in entry["data_offsets"])
            values = torch.from_numpy(data[start:end]).view(_TYPES[entry["dtype"]])
            mapped[name] = values.view(entry["shape"])
    return mapped


_TYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "U8": torch.uint8}

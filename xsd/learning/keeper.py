"""The state after the latest step on a GPU, for a process that is killed: kept in memory there.

To fetch a state takes longer than the step that made it (1.2 GB of an L4 at d = 4096: 23 ms against
16), to copy it within the GPU a twentieth of that. But a process that dies takes its memory along.
So there are two copies, written over in turn, that belong to a process of their own. It waits; when
the training has died, it writes the newer whole copy to the training's state on disk, and ends too.
Who starts the training anew waits for that.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from xsd.errors import XsdError, reason
from xsd.learning.latest import write_if_newer
from xsd.learning.state import FitState

_PROGRESS, _ALIGNMENT, _PATIENCE = "progress", 256, 120.0
_FORGET, _LEAVE = "forget", "leave"


@dataclass(frozen=True, slots=True)
class _Order:
    """What shall be kept: of every tensor its name, type, shape and first byte in a copy."""

    state: Path
    key: str
    device: str
    places: tuple[tuple[str, torch.dtype, torch.Size, int], ...]
    num_bytes: int


class StateHeldError(XsdError):
    """Somebody else trains with this state: what lies there is theirs."""


class Keeper:
    """Keeps the state of one training on ``device``, in the order of its work there."""

    def __init__(self, state: Path, key: str, device: torch.device) -> None:
        self._state, self._key, self._device = state, key, device
        idle = _idle(os.getpid())
        self._process: Connection | None = idle.pop() if idle else _start()
        self._record = self._delta = torch.empty(0)
        self._copies: list[dict[str, Tensor]] = []
        self._turn = 0
        # Beside the next step's products, which leave the memory's bandwidth to it.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @staticmethod
    def is_possible() -> bool:
        """Whether another process can tell when this one has died: on Linux."""
        return hasattr(os, "pidfd_open")

    def begin(self, progress: FitState) -> None:
        """What the host knows at this point; from here on only the device counts."""
        self.hold()
        self._record = torch.tensor(_record(progress), dtype=torch.float64, device=self._device)
        one = FitState(step=1, num_batches=1)
        self._delta = torch.tensor(_record(one), dtype=torch.float64, device=self._device)
        self._delta[[0, _BEST]] = 0.0

    def count(self, loss: Tensor) -> None:
        """A step was taken."""
        self._record += self._delta
        self._record[-1] += loss

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to copy; the same tensors every time. After the first, the host waits for nothing.

        Raises:
            XsdError: there is no room for two copies, or processes cannot share that memory.
        """
        if not self._copies:
            self._copies = self._open({**tensors, _PROGRESS: self._record})
        copy = self._copies[self._turn]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # What is being written over is no state, until all of it is there.
            copy[_PROGRESS].zero_()
            torch._foreach_copy_([copy[name] for name in tensors], list(tensors.values()))
            copy[_PROGRESS].copy_(self._record)
        self._turn = 1 - self._turn

    def hold(self) -> None:
        """To be called before the tensors change: what follows on the device waits for the copy."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def forget(self) -> None:
        """The state on disk is as new."""
        self._close(_FORGET)

    def leave(self) -> None:
        """Training stops here, and may go on later; returns when that is on disk."""
        self._close(_LEAVE)

    def _close(self, message: str) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if self._copies:
            if self._stream is not None:
                # Whatever the device has met, what was kept before is whole.
                with suppress(RuntimeError):
                    self._stream.synchronize()
            self._copies = []
            try:
                process.send(message)
                failed = process.recv()
            except (OSError, EOFError):
                # It has died: of the state there is what was written to disk.
                return
            if failed:
                warnings.warn(_lost(self._state, failed), stacklevel=2)
        _idle(os.getpid()).append(process)

    def _open(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        places, num_bytes = [], 0
        for name, x in tensors.items():
            places.append((name, x.dtype, x.shape, num_bytes))
            num_bytes += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
        order = _Order(self._state, self._key, str(self._device), tuple(places), num_bytes)
        process = self._process
        assert process is not None, "it was closed"
        answer: list[Tensor] | str
        try:
            process.send(order)
            if not process.poll(_PATIENCE):
                raise TimeoutError("no answer")
            answer = process.recv()
        except (OSError, EOFError, RuntimeError) as error:
            # It has died, or this process cannot open what is shared: no other training has it.
            answer, self._process = reason(error), None
            with suppress(OSError):
                process.send(_FORGET)
        if isinstance(answer, str):
            raise XsdError(f"no copies of the training's state are kept on the GPU ({answer})")
        return [_views(copy, order) for copy in answer]


def wait_for_keeper(state: Path) -> None:
    """Until nobody writes ``state`` for a training that was killed.

    Raises:
        StateHeldError: somebody else trains with it.
    """
    path = _lock(state)
    if not path.exists():
        return
    try:
        with FileLock(path, timeout=_PATIENCE):
            path.unlink(missing_ok=True)
    except Timeout as error:
        raise StateHeldError(
            f"{state}: another training has held it for {_PATIENCE:.0f} s; end that one first"
        ) from error


@functools.cache
def _idle(owner: int) -> list[Connection]:
    """Processes that ``owner`` started (and none that was forked from it), for its next training:
    starting one takes seconds."""
    return []


def _start() -> Connection:
    ours, theirs = multiprocessing.Pipe()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Segments that can grow cannot be shared.
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        env.pop(name, None)
    call = f"from {__name__} import main; main({theirs.fileno()}, {os.getpid()})"
    # In a session of its own, it outlives what is sent to the training's whole group.
    _KEEPERS.append(
        subprocess.Popen(
            [sys.executable, "-c", call],
            pass_fds=[theirs.fileno()],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    )
    theirs.close()
    return ours


_KEEPERS: list[subprocess.Popen[bytes]] = []
_MAY_FAIL = (RuntimeError, OSError, ValueError, SafetensorError)
_BEST = 1 + list(FitState.__dataclass_fields__).index("best")


def _record(progress: FitState) -> list[float]:
    """Numbers for the device: 1, then the fields; those that steps add to come last."""
    return [1.0, *(math.nan if value is None else float(value) for value in astuple(progress))]


def _progress(record: Sequence[float]) -> FitState | None:
    """None: the copy is not whole, or training had diverged by then."""
    is_whole, *values = record
    if not is_whole or not math.isfinite(values[-1]):
        return None
    epoch, step, best, epochs_since_best, num_batches, loss_sum = values
    return FitState(
        epoch=int(epoch),
        step=int(step),
        best=None if math.isnan(best) else best,
        epochs_since_best=int(epochs_since_best),
        num_batches=int(num_batches),
        loss_sum=loss_sum,
    )


def _views(copy: Tensor, order: _Order) -> dict[str, Tensor]:
    return {
        name: copy[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for name, dtype, shape, start in order.places
    }


def _lost(state: Path, why: str) -> str:
    return f"{state}: the latest steps are lost ({why})"


def _lock(state: Path) -> Path:
    return state.with_name(f"{state.stem}.keeper.lock")


# ---------------------------------------------------------------- the keeper's side


def main(handle: int, owner: int) -> None:
    """Serve one training after the other until ``owner``, a process, has ended."""
    # What this starts itself must not hold the line open when it has died.
    os.set_inheritable(handle, False)
    connection = Connection(handle)
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        end = os.pidfd_open(owner)
    except ProcessLookupError:
        return
    while isinstance(order := _heard(connection, end), _Order):
        _serve(order, connection, end)


def _serve(order: _Order, connection: Connection, end: int) -> None:
    """Keep one training's state until it is told, or must see, that this is over; then say why that
    went wrong, or None."""
    path, said = _lock(order.state), None
    try:
        with FileLock(path, timeout=0):
            _hold(order, connection, end)
            path.unlink(missing_ok=True)
    except _MAY_FAIL as error:
        said = reason(error)
    if order.device != "cpu":
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
    try:
        connection.send(said)
    except OSError:
        # Nobody is there any more.
        if said is not None:
            print(_lost(order.state, said), file=sys.stderr)


def _hold(order: _Order, connection: Connection, end: int) -> None:
    copies = [
        torch.zeros(order.num_bytes, dtype=torch.uint8, device=order.device) for _ in range(2)
    ]
    connection.send(copies)
    if _heard(connection, end) != _FORGET:
        _write(copies, order)


def _heard(connection: Connection, end: int) -> object:
    """What the owner says; None: it has ended, and what it had begun on the device too."""
    if connection in wait([connection, end]):
        with suppress(EOFError, OSError):
            return connection.recv()
    wait([end])
    return None


def _write(copies: Sequence[Tensor], order: _Order) -> None:
    found = []
    for copy in copies:
        tensors = _views(copy, order)
        progress = _progress(tensors.pop(_PROGRESS).tolist())
        if progress is not None:
            found.append((progress, tensors))
    write_if_newer(order.state, order.key, found)

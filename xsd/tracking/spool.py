"""What a run writes while its tracking server is away: kept in order, and delivered later.

``mlruns/spool/<run>/`` holds the writes, a line each, and hard links of the files they name. The
first write that fails begins it; after that the run goes on without waiting, and asks every few
seconds whether the server is back. What is left when the run ends goes out with the next run or
with ``xsd deliver``. Metrics keep the timestamps that they were logged with.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xsd.errors import XsdError
from xsd.files import write_text
from xsd.tracking import store, writes
from xsd.tracking.artifacts import place
from xsd.tracking.credentials import redacted

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from xsd.tracking.writes import Write

OUTAGE_TAG: Final = "xsd.spooled_since"
DELIVERED_TAG: Final = "xsd.delivered"
_RETRY_SECONDS: Final = 10.0
_WRITES: Final = "writes.jsonl"
_DONE: Final = "delivered"
_SERVER: Final = "server"


class Outbox:
    """The writes of one run, in order, whether the server is there or not."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self._asked = 0.0

    @property
    def folder(self) -> Path:
        return root() / self.run_id

    @property
    def has_undelivered(self) -> bool:
        return (self.folder / _WRITES).is_file()

    def send(self, write: Write) -> str | None:
        """Write, or keep it for later. Returns the id of a logged model that was made now."""
        if self.has_undelivered and not self.retry():
            self._keep(write)
            return None
        try:
            return writes.send(self.client, self.run_id, write)
        except Exception as error:
            if not store.is_outage(error):
                raise
            since = datetime.now(UTC).isoformat(timespec="seconds")
            self._keep(writes.batch(tags={OUTAGE_TAG: since}))
            self._keep(write)
            self._asked = time.monotonic()
            print(
                f"tracking server does not answer: run {self.run_id} goes on,"
                f" and keeps what it writes in {self.folder}",
                file=sys.stderr,
            )
            return None

    def retry(self, *, at_once: bool = False) -> bool:
        """Deliver what is kept, if the server is back; asks it every few seconds only."""
        if not at_once and time.monotonic() - self._asked < _RETRY_SECONDS:
            return False
        self._asked = time.monotonic()
        return store.answers() and deliver(self.client, self.run_id)

    def _keep(self, write: Write) -> None:
        with _lock(self.run_id):
            path = self.folder / _WRITES
            number = len(_lines(path))
            if "files" in write:
                copies = [_copy(Path(file), self.folder, number) for file in write["files"]]
                write = {**write, "files": copies}
            write_text(self.folder / _SERVER, _server())
            with path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(write) + "\n")
                handle.flush()
                os.fsync(handle.fileno())


def pending() -> list[str]:
    """Runs of the present tracking server with undelivered writes."""
    return sorted(
        path.parent.name
        for path in root().glob(f"*/{_WRITES}")
        if (path.parent / _SERVER).read_text(encoding="utf-8") == _server()
    )


def deliver(client: MlflowClient, run_id: str) -> bool:
    """Send what is kept of a run, from where the last attempt ended; False: the server is away.

    Raises:
        XsdError: the server refuses a write; it and what follows stay kept.
    """
    from mlflow.exceptions import MlflowException

    folder = root() / run_id
    with _lock(run_id):
        kept = _lines(folder / _WRITES)
        if not kept:
            return True
        mark = folder / _DONE
        done = int(mark.read_text(encoding="utf-8")) if mark.is_file() else 0
        now = datetime.now(UTC).isoformat(timespec="seconds")
        said = writes.batch(tags={DELIVERED_TAG: f"{len(kept)} writes at {now}"})
        for number, write in enumerate([*map(json.loads, kept), said][done:], start=done):
            files = [str(folder / file) for file in write.get("files", ())]
            try:
                writes.send(client, run_id, {**write, "files": files})
            except Exception as error:
                if store.is_outage(error):
                    return False
                if not isinstance(error, MlflowException):
                    raise
                reason = " ".join(str(error).split())
                raise XsdError(f"{folder}: the server refuses write {number}: {reason}") from error
            write_text(mark, str(number + 1))
        shutil.rmtree(folder)
    print(f"run {run_id}: delivered {len(kept)} writes that the server had missed", file=sys.stderr)
    return True


def deliver_pending(client: MlflowClient) -> None:
    """What earlier runs could not write; a write that is refused stays, and is told of."""
    for run_id in pending():
        try:
            deliver(client, run_id)
        except XsdError as error:
            print(f"warning: {error}", file=sys.stderr)


def root() -> Path:
    return store.local_root() / "spool"


def _server() -> str:
    return redacted(store.tracking_uri())


@contextmanager
def _lock(run_id: str) -> Iterator[None]:
    """A run may be delivered by another process while its own still writes."""
    folder = root() / run_id
    folder.mkdir(parents=True, exist_ok=True)
    with store.lock(f"spool-{run_id}"):
        folder.mkdir(parents=True, exist_ok=True)
        yield
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _lines(path: Path) -> list[str]:
    """Whole lines: a process that was killed may have left half a one."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        write_text(path, "".join(lines[:-1]))
    return [line for line in lines if line.endswith("\n")]


def _copy(file: Path, folder: Path, number: int) -> str:
    """Keep a file's bytes under its own name; returns its path in ``folder``."""
    name = f"files/{number}/{file.name}"
    place(file, folder / name)
    return name

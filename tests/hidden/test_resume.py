"""A process that dies at any moment leaves no trace in what the next one makes."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from tests.hidden.test_store import CONFIG, run
from tests.killing import kill_until_done
from xsd.errors import XsdError
from xsd.hidden import chunk, parts, writer
from xsd.hidden.extract import extract, header
from xsd.hidden.index import INDEX, Header, load_index
from xsd.hidden.plan import Batch, Extracted, plan_batches
from xsd.hidden.store import HiddenStore
from xsd.hidden.writer import HiddenWriter
from xsd.pairs.base import ModelPair
from xsd.types import Scene

ONE = replace(CONFIG, batch_clips=1)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


class Killed(BaseException):
    pass


class Death:
    """Kills at the n-th touch of the disk; nothing touches it after that."""

    def __init__(self, at: int) -> None:
        self.at, self.touches = at, 0
        self._lock = Lock()

    def wrap(self, touch: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*args: Any, **kwargs: Any) -> Any:
            if any(str(arg).endswith(".lock") for arg in args):
                return touch(*args, **kwargs)
            # Threads touch it, too.
            with self._lock:
                self.touches += 1
                is_dead = self.touches > self.at
            if is_dead:
                raise Killed
            return touch(*args, **kwargs)

        return dying


@contextmanager
def dying(at: int) -> Iterator[Death]:
    death = Death(at)
    with pytest.MonkeyPatch.context() as patch:
        for module in (chunk, parts, writer):
            patch.setattr(module, "save_file", death.wrap(module.save_file))
        patch.setattr(shutil, "rmtree", death.wrap(shutil.rmtree))
        # Who only plays dead need not wait for the disk.
        patch.setattr(os, "fsync", lambda _: None)
        for name in ("replace", "unlink", "write_text", "mkdir"):
            patch.setattr(Path, name, death.wrap(getattr(Path, name)))
        yield death


class Work:
    """An extraction whose answers are known beforehand, so that only writing takes time."""

    def __init__(self, pair: ModelPair, scenes: list[Scene]) -> None:
        self.plan: list[Batch] = plan_batches(scenes, "train", ONE, 1)
        self.header: Header = header(pair, self.plan, "train", ONE, "data")
        self.answers: list[Extracted] = list(extract(pair, self.plan, ONE))
        self.stored: set[int] = set()
        """What a process was told that it is kept."""

    def go_on(self, folder: Path) -> int:
        """Number of batches that were answered."""
        with HiddenWriter.open(folder, self.header, self.plan) as keeper:
            assert not self.stored.intersection(keeper.missing), "what was kept is answered again"
            for number in keeper.missing:
                keeper.add(number, self.answers[number])
                self.stored.add(number)
        return len(keeper.missing)


@pytest.fixture(scope="module")
def answered(pair: ModelPair, scenes: list[Scene]) -> Work:
    return Work(pair, scenes)


@pytest.fixture
def work(answered: Work) -> Work:
    answered.stored.clear()
    return answered


@pytest.fixture(scope="module")
def whole(answered: Work, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    answered.stored.clear()
    assert answered.go_on(folder) == 6
    return files(folder)


def test_a_death_at_every_touch_of_the_disk(
    work: Work, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for at in count():
        work.stored.clear()
        folder = tmp_path / str(at)
        with dying(at) as death, suppress(Killed):
            work.go_on(folder)
        if death.touches <= at:
            break
        work.go_on(folder)
        assert files(folder) == whole, f"killed at touch {at}"
    assert files(folder) == whole and at > 50, "it came to its end alive"


@pytest.mark.parametrize("seed", range(20))
def test_many_deaths_in_a_row(
    work: Work, whole: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    for _ in range(draw.randint(3, 10)):
        with dying(draw.randint(0, 30)), suppress(Killed):
            work.go_on(tmp_path)
    work.go_on(tmp_path)
    assert files(tmp_path) == whole


def _extract_in_child(pair: ModelPair, scenes: list[Scene], folder: Path) -> None:
    run(pair, scenes, folder, ONE)
    os._exit(0)


def test_what_a_killed_process_left_half_written_goes(
    work: Work, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Our own temporary files, and those that safetensors makes within."""
    for name in (".chunk_000000.safetensors.7.tmp.safetensors", ".tmpapa25G"):
        path = tmp_path / "chunks" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    work.go_on(tmp_path)
    assert files(tmp_path) == whole


@pytest.mark.slow
def test_sigkill_at_random_moments(
    pair: ModelPair, scenes: list[Scene], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Real processes, models included; killed until one of them comes to its end."""
    draw, deaths = random.Random(0), 0
    for number in range(3):
        folder = tmp_path / str(number)
        deaths += kill_until_done(_extract_in_child, pair, scenes, folder, draw=draw)
        assert files(folder) == whole
    assert deaths >= 6


def test_a_damaged_part_is_made_again(work: Work, whole: dict[str, bytes], tmp_path: Path) -> None:
    for damage in ("cut", "altered", "empty"):
        folder = tmp_path / damage
        work.stored.clear()
        with HiddenWriter.open(folder, work.header, work.plan) as keeper:
            keeper.add(0, work.answers[0])
        [part] = (folder / ".parts").iterdir()
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes({"cut": content[:-20], "altered": content, "empty": b""}[damage])
        with HiddenWriter.open(folder, work.header, work.plan) as keeper:
            assert 0 in keeper.missing
        work.go_on(folder)
        assert files(folder) == whole


def test_an_unfinished_extraction_is_not_opened(work: Work, tmp_path: Path) -> None:
    with HiddenWriter.open(tmp_path, work.header, work.plan) as keeper:
        keeper.add(0, work.answers[0])
    with pytest.raises(XsdError, match="was interrupted"):
        HiddenStore.open(tmp_path)


def test_parts_may_come_in_any_order_and_from_any_process(
    work: Work, whole: dict[str, bytes], tmp_path: Path
) -> None:
    other = parts.Parts(tmp_path, work.header)
    with HiddenWriter.open(tmp_path, work.header, work.plan) as keeper:
        for number in (5, 1, 4):
            other.write(number, work.answers[number])
        for number in (3, 0, 2):
            keeper.add(number, work.answers[number])
    assert files(tmp_path) == whole


def test_a_lost_workers_share_is_missing_at_the_next_run(
    work: Work, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Of two processes one answers batches 0, 2, 4; the other is lost after one of its own."""
    with HiddenWriter.open(tmp_path, work.header, work.plan) as keeper:
        parts.Parts(tmp_path, work.header).write(3, work.answers[3])
        for number in (0, 2, 4):
            keeper.add(number, work.answers[number])
    with HiddenWriter.open(tmp_path, work.header, work.plan) as keeper:
        assert keeper.missing == (1, 5)
        for number in keeper.missing:
            keeper.add(number, work.answers[number])
    assert files(tmp_path) == whole


@contextmanager
def room_for_files_of(num_bytes: int) -> Iterator[None]:
    """The system itself refuses to write beyond that, in any thread."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full(work: Work, whole: dict[str, bytes], tmp_path: Path) -> None:
    room = len(whole[INDEX]) // 4
    with room_for_files_of(room), pytest.raises(OSError, match="File too large") as told:
        work.go_on(tmp_path)
    assert told.value.errno == errno.EFBIG
    assert told.value.filename == str(tmp_path / ".parts/part_000000.safetensors")
    assert set(files(tmp_path)) == {INDEX}
    work.go_on(tmp_path)
    assert files(tmp_path) == whole


@pytest.mark.parametrize("kind", ["chunk", "visual"])
def test_a_disk_that_is_full_when_the_thread_writes(
    work: Work,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    write = getattr(writer, f"write_{kind}")

    def cramped(content: Any, path: Path) -> None:
        with room_for_files_of(100):
            write(content, path)

    def two_batches() -> None:
        with HiddenWriter.open(tmp_path, work.header, work.plan) as keeper:
            for number in (0, 1):
                keeper.add(number, work.answers[number])

    monkeypatch.setattr(writer, f"write_{kind}", cramped)
    with pytest.raises(OSError, match="File too large") as told:
        two_batches()
    assert Path(told.value.filename).name == f"{kind}_000000.safetensors"
    # Nothing counts that is not whole, and what was answered is not lost.
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    assert not load_index(tmp_path).chunks
    monkeypatch.undo()
    work.stored = {0, 1}
    work.go_on(tmp_path)
    assert files(tmp_path) == whole

"""What nothing refers to any more: listed by kind, and removed only when told.

Only what xsd made is looked at: runs that carry its process tag, artifact folders of its own
experiments, its work folders and caches. What a champion, its predecessor, a benchmark or a run
in progress was made of is kept, through all generations.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xsd.errors import XsdError
from xsd.tracking import lineage, products, registry, spool, store
from xsd.tracking.artifacts import local_folder

if TYPE_CHECKING:
    from mlflow.entities import Run

_OURS: Final = "tags.`xsd.process` LIKE '%'"
_RUN_ID: Final = re.compile(r"[0-9a-f]{32}")
_WORK: Final = re.compile(r"[a-z_]+_([0-9a-f]{12})")
_KERNELS: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Item:
    """One thing that may go."""

    kind: str
    name: str
    """Run id or path."""
    why: str
    run_id: str | None = None
    path: Path | None = None
    root: Path | None = None
    """The folder that ``path`` must lie in, or it is not touched."""

    @property
    def num_bytes(self) -> int:
        """What would become free: files with a second name elsewhere do not count."""
        return _weight(self.path) if self.path and _is_inside(self.path, self.root) else 0


def find(older_than_days: float, outputs: Path) -> list[Item]:
    """Everything that may go.

    Args:
        older_than_days: what ended, or was last written, less long ago is kept.
        outputs: where stages keep their work folders.
    """
    before = time.time() - older_than_days * 86400
    items = [*_unfinished(before), *_orphans(before), *_caches(before)]
    # A run in progress may go on in any work folder.
    if not _search(f"{_OURS} AND attributes.status = 'RUNNING'"):
        items += _work_folders(outputs, before)
    return items


def remove(item: Item) -> None:
    """Remove one; what another process removed meanwhile is no error.

    Raises:
        XsdError: the run is no longer what it was when it was listed.
    """
    from mlflow.exceptions import MlflowException

    client = store.client()
    if item.run_id is not None:
        run = client.get_run(item.run_id)
        if run.info.lifecycle_stage == "active":
            if run.info.status not in ("FAILED", "KILLED"):
                raise XsdError(f"run {item.run_id} is {run.info.status} now; it is kept")
            try:
                client.delete_run(item.run_id)
            except MlflowException:
                if client.get_run(item.run_id).info.lifecycle_stage != "deleted":
                    raise
    if item.path is not None and _is_inside(item.path, item.root):
        shutil.rmtree(item.path, onerror=_absent_is_fine)


def stale(silent_hours: float) -> list[tuple[str, str, str]]:
    """Runs that say RUNNING and are not, as (id, name, why).

    Of this host's the process is looked for; of another's, the last sign of life: its newest
    metric (system metrics are written all the time), or its start.
    """
    found = []
    for run in _search(f"{_OURS} AND attributes.status = 'RUNNING'"):
        process = run.data.tags["xsd.process"]
        host, pid, _ = process.rsplit(":", 2)
        hours = (time.time() - _last_sign(run) / 1000) / 3600
        if store.is_gone(process):
            why = f"process {pid} of this host is gone"
        elif host != store.this_process().rsplit(":", 2)[0] and hours > silent_hours:
            why = f"silent for {hours:.0f} hours, of process {pid} on {host}"
        else:
            continue
        found.append((str(run.info.run_id), str(run.info.run_name), why))
    return found


def close(run_id: str) -> None:
    """End a stale run as KILLED."""
    client = store.client()
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, "KILLED")


def protected() -> set[str]:
    """Runs that champions, their predecessors, benchmarks and runs in progress were made of."""
    seen: set[str] = set()
    for version in registry.versions():
        if {registry.CHAMPION, registry.PREVIOUS} & set(version.aliases):
            lineage.up(f"models:/{version.name}/{version.version}", seen=seen)
    for condition in ("tags.stage = 'benchmark'", "attributes.status = 'RUNNING'"):
        for run in _search(f"{_OURS} AND {condition}"):
            # A benchmark that failed refers to nothing that anyone will read.
            if run.info.status in ("FINISHED", "RUNNING"):
                lineage.up(f"runs:/{run.info.run_id}", seen=seen)
    return seen


def _unfinished(before: float) -> Iterator[Item]:
    kept = protected()
    for status in ("FAILED", "KILLED"):
        ended = f"attributes.end_time < {int(before * 1000)}"
        for run in _search(f"{_OURS} AND attributes.status = '{status}' AND {ended}"):
            run_id = str(run.info.run_id)
            if run_id not in kept:
                root = _root(run.info.experiment_id)
                folder = local_folder(run.info.artifact_uri)
                path = folder.parent if folder and folder.name == "artifacts" else folder
                yield Item("run", f"{run_id} {run.info.run_name}", status, run_id, path, root)


def _orphans(before: float) -> Iterator[Item]:
    """Artifact folders whose run was deleted, or is in the store no more."""
    from mlflow.entities import ViewType

    client, kept = store.client(), protected()
    for experiment in client.search_experiments(view_type=ViewType.ALL):
        root = _root(experiment.experiment_id)
        if not experiment.name.startswith(store.EXPERIMENT_PREFIX) or root is None:
            continue
        for path in sorted(root.glob("*")):
            if not _RUN_ID.fullmatch(path.name) or path.name in kept or _newest(path) > before:
                continue
            run = lineage.get(path.name)
            if run is None or run.info.lifecycle_stage == "deleted":
                why = "its run is gone" if run is None else "its run was deleted"
                yield Item("artifacts", str(path), why, path=path, root=root)


def _work_folders(outputs: Path, before: float) -> Iterator[Item]:
    """Chunks and checkpoints that no run has as artifacts, and none was made from by path."""
    runs = _search(_OURS)
    keys = {run.data.tags["xsd.key"][:12] for run in runs if "xsd.key" in run.data.tags}
    read = {
        Path(value).absolute()
        for run in runs
        for name, value in run.data.tags.items()
        if name.startswith("input.") and not value.startswith(("runs:/", "models:/"))
    }
    for path in sorted([*outputs.glob("*/*_*"), *outputs.glob("*_*")]):
        match = _WORK.fullmatch(path.name)
        if not match or match[1] in keys or _newest(path) > before or not path.is_dir():
            continue
        home = path.absolute()
        is_read = any(one.is_relative_to(home) or home.is_relative_to(one) for one in read)
        # A file with a second name is an artifact of a run, perhaps in another store.
        if not is_read and not any(at.stat().st_nlink > 1 for at in _files(path)):
            yield Item("work", str(path), "no run keeps or reads it", path=path, root=outputs)


def _caches(before: float) -> Iterator[Item]:
    for kind, root, why in (
        ("spool", spool.root(), "delivered"),
        ("download", products.downloads(), "a copy; fetched again when needed"),
    ):
        for path in sorted(root.glob("*")):
            if kind == "spool" and (path / "writes.jsonl").exists():
                continue
            if path.is_dir() and _newest(path) <= before:
                yield Item(kind, str(path), why, path=path, root=root)
    current = _kernels()
    if current is None:
        return
    for path in sorted(current.parent.glob("*")):
        if _KERNELS.fullmatch(path.name) and path != current and _newest(path) <= before:
            yield Item("kernels", str(path), "of other sources", path=path, root=current.parent)


def _kernels() -> Path | None:
    """Where the present kernels are cached."""
    from xsd.kernels import options

    return options._FOLDER


def _search(condition: str) -> list[Run]:
    client, experiments, found, token = store.client(), store.experiment_ids(), [], None
    while True:
        page = client.search_runs(experiments, condition, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _root(experiment_id: str) -> Path | None:
    return local_folder(store.client().get_experiment(experiment_id).artifact_location)


def _last_sign(run: Run) -> int:
    """In ms."""
    points = run.data._metric_objs
    return max([int(run.info.start_time), *(int(point.timestamp) for point in points)])


def _is_inside(path: Path, root: Path | None) -> bool:
    """Whether a path is a real folder below ``root``: no link, and not led out of it by one."""
    if root is None or path.is_symlink() or not path.is_dir():
        return False
    resolved, base = path.resolve(), root.resolve()
    return resolved != base and resolved.is_relative_to(base)


def _files(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(path):
        yield from (at for name in names if not (at := Path(folder) / name).is_symlink())


def _weight(path: Path) -> int:
    stats = [at.stat() for at in _files(path)]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def _newest(path: Path) -> float:
    """When anything below was last written."""
    try:
        return max([path.lstat().st_mtime, *(at.stat().st_mtime for at in _files(path))])
    except FileNotFoundError:
        return time.time()  # somebody is at it


def _absent_is_fine(function: object, path: str, error: Any) -> None:
    if not issubclass(error[0], FileNotFoundError):
        raise error[1]

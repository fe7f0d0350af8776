"""The runs of a store, held while a dashboard is open, and what of them a reader asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.config import variant
from xsd.errors import XsdError
from xsd.files import read_json
from xsd.plots.style import kind
from xsd.plots.timeline import Example, data_uri, trace_from
from xsd.tracking import query
from xsd.types import Trace

_HIDDEN = ("mlflow.", "xsd.", "input.", "digest.", "cfg.")
"""Tags that say how a run is kept, not what it is."""
_LONGEST = 40
"""A tag's value beyond this is prose, and nothing to filter by."""


@dataclass(frozen=True)
class Choice:
    """What a reader filters by; None and empty mean all."""

    pair: str | None = None
    since: str | None = None
    """First day, ISO, UTC."""
    until: str | None = None
    """Last day, inclusive."""
    tags: tuple[str, ...] = ()
    """``name=value``; of one name any, of different names all."""


@dataclass(frozen=True)
class Bench:
    """A benchmark's file, as the figures want it."""

    traces: tuple[Trace, ...]
    summary: pd.DataFrame
    media_ms_mean: float
    pieces: dict[str, str]


class Archive:
    """All runs as one frame (``query.runs``); later looks ask only for what changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frame: pd.DataFrame | None = None

    def runs(self) -> pd.DataFrame:
        """The runs as last looked at."""
        with self._lock:
            if self._frame is None:
                self._frame = query.runs(only_finished=False)
            return self._frame

    def refresh(self, whole: bool = False) -> bool:
        """Look again; True if anything changed. ``whole`` finds retagged and deleted runs too."""
        before = self.runs()
        if whole or before.empty:
            after = query.runs(only_finished=False)
        else:
            running = before.loc[before["status"] == "RUNNING", "run_id"]
            news = query.changed(before["started"].max(), running)
            if news.empty:
                return False
            kept = before[~before["run_id"].isin(news["run_id"])]
            after = pd.concat([news, kept], ignore_index=True)
            after = after.sort_values("started", ascending=False, ignore_index=True)
        with self._lock:
            self._frame = after
        columns = ["run_id", "status"]
        return not after[columns].equals(before[columns])

    def chosen(self, choice: Choice) -> pd.DataFrame:
        """The runs that a choice admits."""
        frame = self.runs()
        keep = pd.Series(True, index=frame.index)
        if choice.pair:
            keep &= frame["pair"] == choice.pair
        days = frame["started"].astype(str).str[:10]
        if choice.since:
            keep &= days >= choice.since[:10]
        if choice.until:
            keep &= days <= choice.until[:10]
        wanted: dict[str, set[str]] = {}
        for tag in choice.tags:
            name, _, value = tag.partition("=")
            wanted.setdefault(name, set()).add(value)
        for name, values in wanted.items():
            keep &= pd.Series([tags.get(name) in values for tags in frame["tags"]], frame.index)
        return frame[keep]


def tag_names(frame: pd.DataFrame) -> list[str]:
    """All ``name=value`` that a reader may filter by."""
    found = {
        f"{name}={value}"
        for tags in frame["tags"]
        for name, value in tags.items()
        if not name.startswith(_HIDDEN) and name != "pair" and 0 < len(value) <= _LONGEST
    }
    return sorted(found)


def newest_of(frame: pd.DataFrame, stage: str) -> dict[str, dict[str, Any]]:
    """Of a stage's finished runs the newest of each variant, as records, by the variant's name."""
    rows = frame[(frame["stage"] == stage) & (frame["status"] == "FINISHED")]
    found: dict[str, dict[str, Any]] = {}
    for row in rows.to_dict("records"):
        found.setdefault(variant(row["tags"]), {str(name): value for name, value in row.items()})
    return found


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a run's record that it has."""
    return {str(k): v for k, v in row.items() if isinstance(v, float) and v == v}


@lru_cache(maxsize=256)
def positions(run_id: str) -> list[dict[str, float]]:
    """Counts by answer position of an evaluation; empty if it kept none."""
    try:
        found: list[dict[str, float]] = read_json(query.artifact(run_id, "position_stats.json"))[
            "target"
        ]
    except XsdError:
        return []
    return found


@lru_cache(maxsize=256)
def curve(run_id: str) -> pd.DataFrame:
    """Validation accept length of a training: columns step and value."""
    points = query.history([run_id], ["val.accept_length"])
    return points.drop_duplicates("step").sort_values("step")[["step", "value"]]


@lru_cache(maxsize=8)
def bench(run_id: str) -> Bench:
    """A benchmark's traces and table.

    Raises:
        XsdError: the run keeps none, or they were altered.
    """
    files = read_json(query.newest_artifact(run_id, "e2e_wallclock_*.json"))
    return Bench(
        tuple(trace_from(values) for values in files["traces"]),
        pd.DataFrame(files["summary"]),
        files["media_ms_mean"],
        files.get("pieces", {}),
    )


@lru_cache(maxsize=256)
def trials(run_id: str) -> pd.DataFrame:
    """Trials of a sweep (``search.study.trials_frame``)."""
    return query.table(run_id, "trials")


@lru_cache(maxsize=256)
def importance(run_id: str) -> pd.DataFrame:
    """Importance of a sweep's parameters; empty where it was not kept."""
    try:
        return query.table(run_id, "importance")
    except XsdError:
        return pd.DataFrame()


def example(row: dict[str, Any], strategy: str, sample_key: str) -> Example | None:
    """One sample of a benchmark beside plain decoding of it, with what both models saw.

    None: the benchmark lacks the sample, plain or by the strategy.
    """
    files = bench(row["run_id"])
    found = {
        trace.strategy: trace
        for trace in reversed(files.traces)
        if trace.sample_key == sample_key and trace.strategy in (strategy, files.traces[0].strategy)
    }
    plain, fast = found.get(files.traces[0].strategy), found.get(strategy)
    if plain is None or fast is None:
        return None
    # A benchmark of an earlier version kept texts without their tokens: nothing is marked then.
    texts = [files.pieces.get(str(token), "") for token in fast.token_ids]
    pieces = texts if any(texts) else [fast.text]
    events, frames = pictures(row["tags"].get("input.dataset_dir", ""), sample_key)
    return Example(plain, fast, tuple(pieces), events, frames)


@lru_cache(maxsize=64)
def pictures(dataset: str, sample_key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Event images and video frames of a sample's clip as data URIs; empty where out of reach."""
    from xsd.hidden.media import read_media

    try:
        scene = _scene(dataset, sample_key.rpartition("/")[0])
        media = read_media(scene, max(1, len(scene.event_images)), 8)
    except (XsdError, StopIteration):
        return (), ()
    return tuple(map(data_uri, media.event_images)), tuple(map(data_uri, media.frames))


def _scene(dataset: str, scene_key: str) -> Any:
    """A clip's record, once its files are on this disk."""
    from xsd.scenes.dsec import load_index
    from xsd.scenes.layout import INDEX_NAME, LINK_NAME

    if not dataset.startswith("runs:/"):
        folder = Path(dataset)
        folder = folder if (folder / INDEX_NAME).is_file() else folder / "scenes"
        return next(scene for scene in load_index(folder) if scene.key == scene_key)
    run_id = dataset.removeprefix("runs:/").partition("/")[0]
    try:
        root = query.artifact(run_id, f"scenes/{INDEX_NAME}").parent.resolve()
    except XsdError:
        linked = read_json(query.artifact(run_id, LINK_NAME))["dataset_dir"]
        return next(scene for scene in load_index(Path(linked)) if scene.key == scene_key)
    scene = next(scene for scene in load_index(root) if scene.key == scene_key)
    for path in (*scene.event_images, scene.video):
        query.artifact(run_id, f"scenes/{path.relative_to(root).as_posix()}")
    return scene


def samples(files: Bench) -> list[tuple[str, str]]:
    """Sample keys of a benchmark with their questions, in its order."""
    return list({trace.sample_key: trace.question for trace in files.traces}.items())


def drafting(files: Bench) -> Sequence[str]:
    """The configs of a benchmark that draft: those of the gap lead, and the fastest of a kind."""
    ranks = {"both": 0, "gap": 1, "decode": 2, "control": 3}
    found = files.summary[files.summary["strategy"].map(kind) != "plain"]
    found = found.assign(rank=found["strategy"].map(kind).map(ranks))
    return list(found.sort_values(["rank", "speedup"], ascending=[True, False])["strategy"])

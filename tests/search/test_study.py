from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.conftest import Epochs, Objective, opened, report, search
from xsd.errors import XsdError
from xsd.search.study import candidate, importance_frame, leads, storage_of, trials_frame
from xsd.search.trials import Trial
from xsd.search_config import SearchConfig

BOTH = {"objectives": ("accept_length", "latency_ms")}


def weighed(trial: Trial) -> Epochs:
    """More layers accept more and cost more; a low rate costs accept length alone."""
    layers = trial.params["num_layers"]
    yield report(0, layers + 10 * trial.params["learning_rate"])
    return {"latency_ms": 0.1 * layers}


def test_two_objectives_have_a_front(tmp_path: Path) -> None:
    reports, study = search(tmp_path, weighed, num_trials=12, **BOTH)
    assert {one.state for one in reports} == {"complete"}
    frame = trials_frame(study)
    assert list(frame.columns[:4]) == ["number", "state", "accept_length", "latency_ms"]
    front = frame[frame["on_front"]].sort_values("latency_ms")
    assert front["accept_length"].is_monotonic_increasing
    for row in frame[~frame["on_front"]].itertuples():
        better = frame[
            (frame["accept_length"] >= row.accept_length) & (frame["latency_ms"] <= row.latency_ms)
        ]
        assert len(better) > 1
    best = candidate(study)
    assert best.accept_length == frame["accept_length"].max()
    assert best.number in set(front["number"])


def test_leading_is_not_being_dominated(tmp_path: Path) -> None:
    _, study = search(tmp_path, weighed, num_trials=6, **BOTH)
    best = trials_frame(study)
    most, least = best["accept_length"].max(), best["latency_ms"].min()
    assert leads(study, {"accept_length": most + 1, "latency_ms": 9.0})
    assert leads(study, {"accept_length": 0.0, "latency_ms": least / 2})
    assert not leads(study, {"accept_length": 0.0, "latency_ms": 9.0})


def test_pruned_trials_show_what_they_reached(tmp_path: Path) -> None:
    _, study = search(tmp_path, Objective(9), num_trials=20)
    frame = trials_frame(study)
    pruned = frame[frame["state"] == "pruned"]
    assert len(pruned) and pruned["accept_length"].between(0, 3).all()
    assert (pruned["num_epochs"] < 9).all() and not pruned["on_front"].any()


def test_importance_finds_what_matters(tmp_path: Path) -> None:
    _, study = search(tmp_path, weighed, num_trials=30, **BOTH)
    shares = importance_frame(study).set_index(["objective", "parameter"])["importance"]
    assert shares["latency_ms"].idxmax() == "num_layers"
    assert shares["accept_length"].idxmax() == "num_layers"
    assert shares["accept_length"].sum() == pytest.approx(1.0)


def test_importance_of_too_little_is_empty(tmp_path: Path) -> None:
    _, study = search(tmp_path, Objective(), num_trials=2)
    assert importance_frame(study).empty


def test_where_a_study_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XSD_STORAGE", raising=False)
    assert storage_of(SearchConfig(), tmp_path) == str(tmp_path / "study.log")
    secret = "postgresql://me:pw@host/base"
    monkeypatch.setenv("XSD_STORAGE", secret)
    assert storage_of(SearchConfig(), tmp_path) == secret
    assert storage_of(SearchConfig(storage="a.log"), tmp_path) == "a.log"
    with pytest.raises(XsdError, match="XSD_STORAGE") as caught:
        storage_of(SearchConfig(storage=secret), tmp_path)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "storage", ["sqlite:////nowhere/at/all.db", "nonsense://me:pw@host/base", "://"]
)
def test_a_storage_that_cannot_be_opened(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XSD_STORAGE", storage)
    with pytest.raises(XsdError, match="storage") as caught:
        opened(tmp_path)
    assert "pw" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"num_trials": 0},
        {"num_startup_trials": -1},
        {"num_workers": 0},
        {"stale_minutes": 0.0},
        {"objectives": ()},
        {"objectives": ("latency_ms",)},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(XsdError, match=next(iter(options))):
        SearchConfig(**options)  # type: ignore[arg-type]

from __future__ import annotations

import threading

import pytest

from xsd.tracking import store, system
from xsd.tracking.run import Run, stage_run

pytestmark = pytest.mark.usefixtures("tracking")


def watched(stage: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the system metrics of a run that goes on until two are there, if any."""
    monkeypatch.setenv(system.INTERVAL, "0.02")
    twice, original = threading.Event(), Run.sample

    def sample(self: Run, metrics: dict[str, float], step: int) -> None:
        original(self, metrics, step)
        if step:
            twice.set()

    monkeypatch.setattr(Run, "sample", sample)
    with stage_run(stage, "tiny", {}) as run:
        if any(thread.name == "system" for thread in threading.enumerate()):
            assert twice.wait(60)
    assert not any(thread.name == "system" for thread in threading.enumerate())
    logged = store.client().get_run(run.run_id).data.metrics
    return {name for name in logged if name.startswith("system/")}


@pytest.mark.parametrize(
    ("stage", "switch", "is_on"),
    [
        *(("train", None, True), ("train", "false", False)),
        *(("benchmark", None, False), ("evaluate", "true", True)),
    ],
)
def test_long_stages_are_watched_unless_told_otherwise(
    stage: str, switch: str | None, is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(system.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(system.SWITCH, switch)
    found = watched(stage, monkeypatch)
    assert bool(found) == is_on
    if is_on:
        assert "system/cpu_utilization_percentage" in found
        assert "system/system_memory_usage_megabytes" in found


def test_what_a_stage_says_is_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_run("extract", "tiny", {}) as run:
        run.say("extract: 3 train answers")
        run.say("extract: 2 test answers")
    assert capsys.readouterr().out == "extract: 3 train answers\nextract: 2 test answers\n"
    note = store.client().get_run(run.run_id).data.tags["mlflow.note.content"]
    assert note == "extract: 3 train answers\n\nextract: 2 test answers"

from __future__ import annotations

import pytest
import torch

from xsd.clock import Laps, interleaved


def test_rounds_hold_every_task_once_after_the_warm_up() -> None:
    ran: list[str] = []
    tasks = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = interleaved(tasks, torch.device("cpu"), repeats=5, warmup=1)
    assert ran[:3] == ["a", "b", "c"] and len(ran) == 18
    rounds = [ran[i : i + 3] for i in range(3, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert all(len(times[name]) == 5 and min(times[name]) >= 0 for name in tasks)


def test_laps_share_out_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0, 2_000_000, 5_000_000, 9_000_000])
    monkeypatch.setattr("xsd.clock.time.monotonic_ns", lambda: next(readings))
    laps = Laps()
    assert laps.lap("vision") == 2
    assert laps.lap("passes", {"head": 1.0}) == 3
    assert laps.lap("vision") == 4
    assert laps.ms == {"vision": 6.0, "head": 1.0, "passes": 2.0}

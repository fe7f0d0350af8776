"""The event camera against what its model says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsd.scenes.config import EventCameraConfig
from xsd.scenes.events import Events
from xsd.scenes.simulate import _DARK, _outside_refractory, simulate_events

IDEAL = EventCameraConfig(
    contrast_threshold=0.2,
    threshold_spread=0.0,
    refractory_us=0,
    noise_rate_hz=0.0,
    num_hot_pixels=0,
)


def simulate(luma: np.ndarray, config: EventCameraConfig = IDEAL, seed: int = 0) -> Events:
    times = np.linspace(0, 900_000, len(luma))
    return simulate_events(luma.astype(np.float32), times, config, np.random.default_rng(seed))


def brightening(factor: float, steps: int = 10) -> np.ndarray:
    """One pixel whose log intensity (dark current included) changes linearly by log(factor)."""
    ramp = (0.2 + _DARK) * np.exp(np.linspace(0, np.log(factor), steps)) - _DARK
    return np.tile(ramp[:, None, None], (1, 2, 3))


@given(st.floats(1.05, 4.0), st.booleans())
def test_one_event_a_threshold_at_its_time(factor: float, darker: bool) -> None:
    luma = brightening(factor)
    events = simulate(luma[::-1] if darker else luma)
    crossings = np.arange(0.2, np.log(factor) - 1e-4, 0.2)
    mine = (events.x == 1) & (events.y == 0)
    assert abs(int(mine.sum()) - len(crossings)) <= 1
    shared = min(int(mine.sum()), len(crossings))
    expected = crossings / np.log(factor) * 900_000
    assert np.allclose(events.t[mine][:shared], expected[:shared], atol=3000)
    assert set(events.p[mine].tolist()) <= ({0} if darker else {1})


def test_still_scene_is_silent_and_brightness_cancels() -> None:
    assert len(simulate(np.full((10, 8, 8), 0.5))) == 0
    noisy = simulate(np.full((10, 64, 64), 0.5), EventCameraConfig(num_hot_pixels=0))
    assert 300 < len(noisy) < 700


def test_sorted_and_deterministic() -> None:
    luma = np.random.default_rng(1).uniform(0.1, 0.9, (12, 16, 16))
    first, again = (simulate(luma, EventCameraConfig(), seed=3) for _ in range(2))
    assert (np.diff(first.t) >= 0).all()
    assert all(np.array_equal(getattr(first, k), getattr(again, k)) for k in "xytp")
    other = simulate(luma, EventCameraConfig(), seed=4)
    assert len(other) != len(first) or not np.array_equal(other.t, first.t)


@pytest.mark.parametrize("period_us", [500, 5000, 50_000])
def test_refractory_period_of_every_pixel(period_us: int) -> None:
    luma = np.random.default_rng(1).uniform(0.05, 0.95, (12, 8, 8))
    events = simulate(luma, EventCameraConfig(refractory_us=period_us))
    pixel = events.y.astype(int) * 8 + events.x
    for index in range(64):
        assert (np.diff(events.t[pixel == index]) >= period_us).all()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=40))
def test_refractory_equals_the_sequential_rule(rows: list[tuple[int, int]]) -> None:
    pixel = np.array([row[0] for row in rows], dtype=np.int64)
    t = np.array([row[1] for row in rows], dtype=np.int64)
    last: dict[int, int] = {}
    expected = []
    for one, when in sorted(rows):
        if when - last.get(one, -1000) >= 10:
            last[one] = when
            expected.append((one, when))
    kept = _outside_refractory(pixel, t, 10)
    assert [(int(pixel[k]), int(t[k])) for k in kept] == expected

"""Scenes show what their facts say, and events cannot tell colours."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from xsd.scenes import facts as vocabulary
from xsd.scenes.facts import Facts, Vehicle
from xsd.scenes.render import render
from xsd.scenes.synthetic import make_scene, sample_facts, scene_tensors

BASE = Facts(
    time="day",
    road="straight",
    roadside="trees",
    light="red",
    pedestrian="left",
    vehicles=(Vehicle("car", "red", "left", "approaching", "near"),),
)


def with_vehicle(**changes: str) -> Facts:
    return replace(BASE, vehicles=(replace(BASE.vehicles[0], **changes),))


def test_values_are_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_facts(rng) for _ in range(500)]
    for name, options in (
        ("time", vocabulary.TIMES),
        ("road", vocabulary.ROADS),
        ("roadside", vocabulary.ROADSIDES),
        ("light", vocabulary.LIGHTS),
        ("pedestrian", vocabulary.PEDESTRIANS),
    ):
        counts = Counter(getattr(facts, name) for facts in drawn)
        assert set(counts) == set(options)
        assert min(counts.values()) > 0.6 * len(drawn) / len(options)
    assert Counter(len(facts.vehicles) for facts in drawn).keys() == {1, 2, 3}
    for facts in drawn[:200]:
        lanes = [vocabulary.LANES.index(vehicle.lane) for vehicle in facts.vehicles]
        assert lanes == sorted(set(lanes))


def test_recordings_share_time_and_roadside() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        facts = sample_facts(rng, BASE)
        assert (facts.time, facts.roadside) == (BASE.time, BASE.roadside)


@pytest.mark.parametrize("size", [64, 96])
def test_rendered_shapes(size: int) -> None:
    rendered = render(BASE, seed=1, size=size)
    assert rendered.frames.shape == (20, size, size, 3)
    assert rendered.luma.shape == (50, size, size)
    assert rendered.luma.min() >= 0
    assert rendered.luma.max() <= 1
    assert (np.diff(rendered.times_us) > 0).all()


def test_equal_arguments_give_equal_scenes() -> None:
    first, events = make_scene(BASE, seed=7, size=64)
    again, same = make_scene(BASE, seed=7, size=64)
    assert np.array_equal(first.frames, again.frames)
    assert np.array_equal(events.t, same.t)
    other, _ = make_scene(BASE, seed=8, size=64)
    assert not np.array_equal(first.frames, other.frames)


def distance(first: Facts, second: Facts) -> float:
    """Largest mean difference of a frame, 0 to 255."""
    a, b = (render(facts, seed=3, size=64).frames.astype(int) for facts in (first, second))
    return float(np.abs(a - b).mean(axis=(1, 2, 3)).max())


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("time", vocabulary.TIMES),
        ("road", vocabulary.ROADS),
        ("roadside", vocabulary.ROADSIDES),
        ("light", vocabulary.LIGHTS),
        ("pedestrian", vocabulary.PEDESTRIANS),
    ],
)
def test_every_fact_of_the_scene_shows_in_frames(field: str, options: tuple[str, ...]) -> None:
    for first, second in pairwise(options):
        assert distance(replace(BASE, **{field: first}), replace(BASE, **{field: second})) > 0.3


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("kind", vocabulary.KINDS),
        ("color", vocabulary.COLORS),
        ("lane", vocabulary.LANES),
        ("motion", vocabulary.MOTIONS),
        ("distance", vocabulary.DISTANCES),
    ],
)
def test_every_fact_of_a_vehicle_shows_in_frames(field: str, options: tuple[str, ...]) -> None:
    for first, second in pairwise(options):
        assert distance(with_vehicle(**{field: first}), with_vehicle(**{field: second})) > 0.3


@pytest.mark.parametrize(
    "other",
    [with_vehicle(color="black"), with_vehicle(color="yellow"), replace(BASE, light="green")],
    ids=["black", "yellow", "green light"],
)
def test_events_cannot_tell_colours_nor_the_state_of_a_light(other: Facts) -> None:
    rendered, events = make_scene(BASE, seed=5)
    repainted, same = make_scene(other, seed=5)
    assert not np.array_equal(rendered.frames, repainted.frames)
    assert all(np.array_equal(getattr(events, name), getattr(same, name)) for name in "xytp")


@pytest.mark.parametrize(
    "other",
    [
        with_vehicle(kind="bus"),
        with_vehicle(lane="right"),
        with_vehicle(motion="receding"),
        with_vehicle(distance="far"),
        replace(BASE, road="crossing"),
        replace(BASE, pedestrian="none"),
        replace(BASE, light="none"),
    ],
)
def test_events_tell_shape_and_motion(other: Facts) -> None:
    counts = []
    for facts in (BASE, other):
        _, events = make_scene(facts, seed=5, size=64)
        cells = events.y.astype(int) // 8 * 8 + events.x // 8
        counts.append(np.bincount(cells, minlength=64))
    assert np.abs(counts[0] - counts[1]).max() > 50


@pytest.mark.parametrize("motion", vocabulary.MOTIONS)
def test_motion_changes_the_size(motion: str) -> None:
    facts = replace(with_vehicle(motion=motion, color="red"), light="none", pedestrian="none")
    frames = render(facts, seed=2).frames.astype(int)
    red = (frames[..., 0] > 150) & (frames[..., 1] < 80) & (frames[..., 2] < 80)
    first, last = red[0].sum(), red[-1].sum()
    grows = {"approaching": last > 1.5 * first, "receding": first > 1.5 * last}
    assert grows.get(motion, first < last < 2.2 * first)


def test_tensors_are_what_files_give() -> None:
    frames, images = scene_tensors(BASE, seed=1, size=64)
    assert frames.shape == (8, 64, 64, 3)
    assert len(images) == 5
    assert all(max(image.shape[:2]) <= 64 for image in images)

"""Seeded driving scenes: what is true, what a camera sees, what an event camera sees, and files."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from xsd.scenes import facts as vocabulary
from xsd.scenes.config import EventCameraConfig
from xsd.scenes.events import Events, event_images
from xsd.scenes.facts import Facts, Vehicle
from xsd.scenes.render import Rendered, render
from xsd.scenes.simulate import simulate_events
from xsd.scenes.video import round_trip


def sample_facts(rng: np.random.Generator, recording_facts: Facts | None = None) -> Facts:
    """Draw a scene's facts, every value of an attribute equally likely; one to three vehicles.

    Clips of one recording share time of day and roadside: pass any of its facts.
    """

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    lanes = rng.permutation(len(vocabulary.LANES))[: int(rng.integers(1, 4))]
    time, roadside = pick(vocabulary.TIMES), pick(vocabulary.ROADSIDES)
    return Facts(
        time=recording_facts.time if recording_facts else time,
        road=pick(vocabulary.ROADS),
        roadside=recording_facts.roadside if recording_facts else roadside,
        light=pick(vocabulary.LIGHTS),
        pedestrian=pick(vocabulary.PEDESTRIANS),
        vehicles=tuple(
            Vehicle(
                kind=pick(vocabulary.KINDS),
                color=pick(vocabulary.COLORS),
                lane=vocabulary.LANES[lane],
                motion=pick(vocabulary.MOTIONS),
                distance=pick(vocabulary.DISTANCES),
            )
            for lane in sorted(int(lane) for lane in lanes)
        ),
    )


def make_scene(
    facts: Facts,
    seed: int,
    size: int = 96,
    appearance: int | None = None,
    event_camera: EventCameraConfig | None = None,
) -> tuple[Rendered, Events]:
    """A second of a scene, as both cameras record it. Equal arguments give equal scenes."""
    config = event_camera or EventCameraConfig()
    rendered = render(facts, seed, size, appearance, config.num_subframes)
    rng = np.random.default_rng([seed, 17])
    return rendered, simulate_events(rendered.luma, rendered.times_us, config, rng)


def scene_tensors(
    facts: Facts,
    seed: int,
    size: int = 96,
    num_event_images: int = 5,
    appearance: int | None = None,
    event_camera: EventCameraConfig | None = None,
) -> tuple[UInt8[np.ndarray, "8 H W 3"], list[UInt8[np.ndarray, "_ _ 3"]]]:
    """What files of the scene would give, without files.

    Returns:
        The eight sampled frames after H.264, and the event images (their sizes may differ).
    """
    rendered, events = make_scene(facts, seed, size, appearance, event_camera)
    return round_trip(rendered.frames), event_images(events, num_event_images)

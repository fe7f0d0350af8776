"""Facts to pictures: a second of driving, as frames (colour) and as sub-frames (luma).

Everything is painted for all instants at once. The ground is a sum of few products of a picture
and a function of row and time (dashes scroll, a crossing comes closer), the roadside is looked up
in a scrolling texture, and vehicles are sprites scaled with their distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from xsd.scenes import actors, backdrop
from xsd.scenes import roadside as rs
from xsd.scenes.camera import DURATION_US, FPS, MARGIN, NUM_FRAMES, Camera
from xsd.scenes.facts import Facts
from xsd.scenes.view import View, over

NUM_VARIANTS = 8
_CROSSING_LENGTH = 6.5
_ZEBRA_LENGTH = 2.2


@dataclass(frozen=True)
class Rendered:
    """One second of one scene."""

    frames: UInt8[np.ndarray, "20 H W 3"]
    luma: Float[np.ndarray, "S H W"]
    """Linear luminance in (0, 1] at ``times_us``."""
    times_us: Float[np.ndarray, " S"]


def render(
    facts: Facts, seed: int, size: int = 96, appearance: int | None = None, num_subframes: int = 50
) -> Rendered:
    """Draw a scene.

    Args:
        facts: what must be seen.
        seed: of the clip: places along the road, camera shake.
        size: height and width in pixels.
        appearance: of the recording (palette, horizon, skyline); None: drawn from ``seed``.
        num_subframes: instants of ``luma``, evenly over the second.
    """
    rng = np.random.default_rng([seed, 5])
    variant = (seed if appearance is None else appearance) % NUM_VARIANTS
    camera = Camera(size, facts.road, variant)
    shake = rng.uniform(0, 2 * np.pi, 4)
    phase = float(rng.uniform(0, 32))
    colors = View(facts, camera, phase, (0, 1, 2), np.arange(NUM_FRAMES) / FPS)
    times_us = np.arange(num_subframes) * (DURATION_US / num_subframes)
    sensed = View(facts, camera, phase, (4,), times_us / DURATION_US)
    planes = (_shaken(_paint(colors), colors, shake) * 255 + 0.5).clip(0, 255).astype(np.uint8)
    frames = np.ascontiguousarray(planes.transpose(1, 2, 3, 0))
    return Rendered(frames, _shaken(_paint(sensed), sensed, shake)[0], times_us)


def _paint(view: View) -> Float[np.ndarray, "C H W T"]:
    # Time is the last axis: what a pixel shows over the second then lies together in memory.
    picture = _backdrop(view)
    _paint_roadside(picture, view)
    actors.paint_vehicles(picture, view)
    if view.facts.pedestrian != "none":
        actors.paint_pedestrian(picture, view)
    if view.facts.light != "none":
        actors.paint_light(picture, view)
    return picture


def _shaken(
    picture: Float[np.ndarray, "C H W T"], view: View, shake: Float[np.ndarray, " 4"]
) -> Float[np.ndarray, "C T h w"]:
    """The inner part of the picture, moved by fractions of a pixel as the car pitches and yaws."""
    size, time = view.camera.size, 2 * np.pi * view.seconds
    unit = size / 96
    down = unit * (0.55 * np.sin(1.9 * time + shake[0]) + 0.2 * np.sin(4.3 * time + shake[1]))
    right = unit * (0.75 * np.sin(1.1 * time + shake[2]) + 0.2 * np.sin(3.7 * time + shake[3]))
    source = np.ascontiguousarray(picture.transpose(0, 3, 1, 2))
    moved = np.empty((len(picture), len(time), size, size), np.float32)
    for k, (y, x) in enumerate(zip(MARGIN + down, MARGIN + right, strict=True)):
        row, column = int(y), int(x)
        wide = source[:, k, row : row + size + 1, column : column + size + 1]
        tall = np.diff(wide, axis=1)
        tall *= np.float32(y - row)
        tall += wide[:, :-1]
        out = np.subtract(tall[:, :, 1:], tall[:, :, :-1], out=moved[:, k])
        out *= np.float32(x - column)
        out += tall[:, :, :-1]
    return moved


def _share(
    view: View, start: float, length: float, period: float | None = None
) -> Float[np.ndarray, "rows T"]:
    """Part of every row's footprint that lies in a stretch of road, or in a repeated one."""
    camera = view.camera
    edges = np.arange(int(np.ceil(camera.horizon)), camera.canvas + 1)[:, None]
    z = camera.depth(edges.astype(float)) + (view.travel - start)
    if period is None:
        covered = np.clip(z, 0, length)
    else:
        turns = np.floor(z / period)
        covered = turns * length + np.minimum(z - turns * period, length)
    share = (covered[:-1] - covered[1:]) / np.maximum(z[:-1] - z[1:], 1e-6)
    return np.asarray(share, np.float32)


def _crossing_start(view: View) -> float:
    """Where the side road begins in the middle of the clip, metres ahead."""
    return 9.5 + (view.phase % 2.5)


def _rgb(*color: int) -> Float[np.ndarray, " 3"]:
    return np.array(color, np.float32) / 255


def _backdrop(view: View) -> Float[np.ndarray, "C H W T"]:
    """Sky and ground."""
    camera, time = view.camera, view.facts.time
    terms = _ground_terms(view)
    weights = np.stack([weight for weight, _ in terms], axis=1)
    light = backdrop.ambient(time) * backdrop.headlights(camera, time)
    planes = view.tint(np.stack([picture * light for _, picture in terms], axis=2))
    rows = planes.shape[1]
    picture = np.empty((len(planes), camera.canvas, camera.canvas, len(view.seconds)), np.float32)
    # The sensor sees one sky at all hours, only darker: no event tells the sun from the stars.
    sky = backdrop.sky(camera, time, view.facts.roadside)
    if view.channels == (4,):
        sky = backdrop.sky(camera, "day", view.facts.roadside) * backdrop.ambient(time)
    picture[:, :-rows] = view.tint(sky)[:, :-rows, :, None]
    np.matmul(planes, weights, out=picture[:, -rows:])
    return picture


def _ground_terms(
    view: View,
) -> list[tuple[Float[np.ndarray, "rows T"], Float[np.ndarray, "rows W 3"]]]:
    """The ground as a sum of (weight by row and time) x (picture)."""
    mask, ground = backdrop.ground(view.camera, view.facts.roadside)
    asphalt, white = _rgb(*backdrop.ASPHALT), _rgb(250, 250, 246)
    crossing = view.facts.road == "crossing"
    start = _crossing_start(view)
    side_road = _share(view, start, _CROSSING_LENGTH if crossing else 0.0)
    zebra = _share(view, start - 0.6 - _ZEBRA_LENGTH, _ZEBRA_LENGTH if crossing else 0.0)
    clear = 1 - side_road - zebra
    lines = mask["kerb"] * (_rgb(178, 176, 170) - ground) + mask["edge"] * (white - ground)
    dashes = clear * _share(view, view.phase, 1.6, 4.0)
    # Two faint textures, each less its mean, so that the ground itself flows.
    grain = _share(view, view.phase * 1.7, 0.8, 2.1) - np.float32(0.38)
    patch = _share(view, view.phase * 2.3, 2.2, 5.3) - np.float32(0.41)
    terms = [
        (np.ones_like(clear), ground),
        (clear, lines),
        (dashes, mask["dash"] * (white - ground)),
        (grain, mask["grain"] * 0.09 * ground),
        (patch, mask["patch"] * 0.10 * ground),
    ]
    if crossing:
        terms.append((side_road, (1 - mask["road"]) * (asphalt - ground)))
        terms.append((zebra, mask["zebra"] * (white - ground)))
    return terms


def _paint_roadside(picture: Float[np.ndarray, "C H W T"], view: View) -> None:
    facts, camera = view.facts, view.camera
    row, column, base, cells = rs.plane_cells(camera, facts.roadside)
    crossing = facts.road == "crossing"
    texture = rs.plane_texture(facts.roadside, facts.time, camera.variant, crossing)
    # The texture's gap begins at 0: let it meet the side road.
    origin = _crossing_start(view) - 1.0 if crossing else view.phase
    along = rs.PLANE_BINS[0]
    shift = (view.travel - origin + rs.PLANE_LENGTH_M) * (along / rs.PLANE_LENGTH_M)
    index = (cells[:, None] + shift.astype(np.float32)).astype(np.intp)
    index &= along - 1
    index += base[:, None]
    area = picture[:, row, column]
    over(area, view, texture, index)
    picture[:, row, column] = area

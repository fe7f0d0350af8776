"""Vehicles, pedestrians and traffic lights: where they are at every instant, and their painting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from xsd.scenes import backdrop
from xsd.scenes.camera import DEPTH, MARGIN
from xsd.scenes.facts import Vehicle
from xsd.scenes.sprites import (
    Sprite,
    lane_position,
    light_sprite,
    pedestrian_sprite,
    vehicle_sprite,
)
from xsd.scenes.view import View, over

_GROWTH = {"approaching": 0.36, "receding": -0.36}
"""Half the change of log size in a second."""
_PEDESTRIAN_DEPTH = 6.6


@dataclass(frozen=True)
class _Actor:
    """A sprite and where it is at every instant."""

    sprite: Sprite
    row: Float[np.ndarray, " T"]
    column: Float[np.ndarray, " T"]
    scale: Float[np.ndarray, " T"]
    """Pixels a metre."""
    phase: Int[np.ndarray, " T"]


def _actor(
    view: View,
    sprite: Sprite,
    x: Float[np.ndarray, " T"],
    depth: Float[np.ndarray, " T"],
    phase: Int[np.ndarray, " T"],
) -> _Actor:
    """Something that stands on the road."""
    camera = view.camera
    row, column = camera.row(0.0, depth), camera.column(x, depth)
    return _Actor(sprite, row, column, camera.focal / depth, phase)


def _parts(view: View) -> list[Int[np.ndarray, " part"]]:
    """Quarters of the second: short, so that the box around a growing sprite stays tight."""
    return np.array_split(np.arange(len(view.seconds)), 4)


def _paint_actor(
    picture: Float[np.ndarray, "C H W T"],
    view: View,
    actor: _Actor,
    part: Int[np.ndarray, " part"],
    gain: Float[np.ndarray, " C"] | None = None,
) -> None:
    """Draw a sprite at some instants, its light multiplied by ``gain``."""
    limit, sprite = picture.shape[1], actor.sprite
    row, column = actor.row[part], actor.column[part]
    zoom = sprite.resolution / actor.scale[part]
    (up, left), (height, width) = sprite.anchor, (sprite.height, sprite.width)
    top, bottom = np.min(row - up / zoom), np.max(row + (height - up) / zoom)
    first, last = np.min(column - left / zoom), np.max(column + (width - left) / zoom)
    y = np.arange(max(int(top), 0), min(int(bottom) + 1, limit))
    x = np.arange(max(int(first), 0), min(int(last) + 1, limit))
    if not len(y) or not len(x):
        return
    v = ((y[:, None] + 0.5 - row) * zoom + up).clip(0, height - 1).astype(np.intp)
    u = ((x[:, None] + 0.5 - column) * zoom + left).clip(0, width - 1).astype(np.intp)
    v += actor.phase[part] * height
    index = (v * width)[:, None] + u[None]
    area = picture[:, y[0] : y[-1] + 1, x[0] : x[-1] + 1, part[0] : part[-1] + 1]
    over(area, view, sprite.texture, index, gain)


def _object_light(view: View) -> Float[np.ndarray, " C"]:
    """Things on the road stand in our own headlights: colours stay visible at night."""
    light = backdrop.ambient(view.facts.time)
    return view.tint(light + (1 - light) * (0.5 if view.facts.time == "night" else 0.3))


def paint_vehicles(picture: Float[np.ndarray, "C H W T"], view: View) -> None:
    actors, light = (
        [_vehicle(view, vehicle) for vehicle in view.facts.vehicles],
        _object_light(view),
    )
    for part in _parts(view):
        # Far ones first, and anew in every part: one may overtake another.
        for actor in sorted(actors, key=lambda actor: float(actor.scale[part].mean())):
            _paint_actor(picture, view, actor, part, light)


def _vehicle(view: View, vehicle: Vehicle) -> _Actor:
    seconds, middle = view.seconds, DEPTH[vehicle.distance]
    x = np.full_like(seconds, lane_position(vehicle))
    if vehicle.motion == "parked":
        depth = middle - view.travel
    else:
        depth = middle * np.exp(-2 * _GROWTH[vehicle.motion] * (seconds - 0.5))
    phase = (seconds * 4).astype(int) % 2
    if vehicle.kind == "cyclist" and vehicle.motion != "parked":
        x = x + 0.12 * np.sin(2 * np.pi * 1.5 * seconds)
        phase = (seconds * 5).astype(int) % 2
    return _actor(view, vehicle_sprite(vehicle), x, depth, phase)


def paint_pedestrian(picture: Float[np.ndarray, "C H W T"], view: View) -> None:
    direction = view.facts.pedestrian
    sign = 1.0 if direction == "right" else -1.0
    depth = _PEDESTRIAN_DEPTH - 0.4 * view.travel
    x = sign * 3.6 * (view.seconds - 0.5) + (view.phase % 3.0 - 1.5)
    phase = (view.seconds * 10).astype(int) % 4
    actor = _actor(view, pedestrian_sprite(direction, view.camera.variant), x, depth, phase)
    for part in _parts(view):
        _paint_actor(picture, view, actor, part, _object_light(view))


def paint_light(picture: Float[np.ndarray, "C H W T"], view: View) -> None:
    unit = view.camera.size / 96
    grow = 1 + 0.06 * (view.seconds - 0.5)
    row = np.full_like(grow, MARGIN + unit * 27.0)
    column = view.camera.canvas / 2 + unit * 33.0 * grow
    sprite = light_sprite(view.facts.light, view.facts.time)
    actor = _Actor(sprite, row, column, unit * 3.9 * grow, np.zeros(len(grow), int))
    _paint_actor(picture, view, actor, np.arange(len(grow)))

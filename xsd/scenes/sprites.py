"""Pictures of the things that move: vehicles, pedestrians, traffic lights.

A vehicle is a few boxes projected by the scene's own camera at its nominal distance, so that a car
in the left lane shows its right flank. Every sprite has phases (lamps blink, legs move) and two
kinds of brightness: what frames see, and ``luma``, what the event sensor sees. In the latter all
paints and all lamps reflect alike: colour carries no information there, by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from xsd.scenes.backdrop import Color, luma
from xsd.scenes.camera import DEPTH, LANE_X, Camera
from xsd.scenes.facts import Vehicle

PAINT: dict[str, Color] = {
    "red": (216, 36, 40),
    "blue": (36, 88, 224),
    "white": (246, 246, 246),
    "black": (26, 26, 30),
    "yellow": (246, 206, 30),
    "green": (38, 160, 70),
}
_COATS: tuple[Color, ...] = ((232, 110, 36), (150, 70, 170), (238, 140, 160), (60, 170, 180))
_SENSED_PAINT: Color = (150, 150, 150)
_GLASS: Color = (48, 62, 78)
_TYRE: Color = (20, 20, 22)
_AMBER: Color = (255, 168, 24)
_OVERSAMPLING = 4
"""Sprite pixels to a picture pixel at the nominal distance, for a picture of 96 pixels."""


@dataclass(frozen=True)
class Sprite:
    """A picture with an anchor: the point of the ground it stands on."""

    texture: Float[np.ndarray, "5 cells"]
    """Premultiplied red, green, blue; alpha; premultiplied luma. Phases lie below each other."""
    height: int
    width: int
    anchor: tuple[float, float]
    """Row and column, in sprite pixels."""
    num_phases: int
    resolution: float
    """Sprite pixels a metre."""


class _Pen:
    """Projects corners in metres, relative to a point on the ground, onto a sprite."""

    def __init__(self, camera: Camera, x: float, z: float, box: tuple[float, float, float, float]):
        self._camera, self._x, self._z = camera, x, z
        self._left, self._top, right, bottom = box
        self.resolution = _OVERSAMPLING * 65.28 / z
        width = int((right - self._left) * self.resolution) + 2
        height = int((bottom - self._top) * self.resolution) + 2
        self.image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)

    @property
    def anchor(self) -> tuple[float, float]:
        return -self._top * self.resolution, -self._left * self.resolution

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Sprite pixel of the point x to the right, y up and z behind the anchor."""
        scale = self._z / (self._z + z)
        column = (self._x + x) * scale - self._x
        row = self._camera.height - (self._camera.height - y) * scale
        # Rows count down from the anchor's: the ground there is at camera height below the axis.
        return (column - self._left) * self.resolution, (-row - self._top) * self.resolution

    def face(self, corners: list[tuple[float, float, float]], fill: tuple[int, ...]) -> None:
        self.draw.polygon([self.at(*corner) for corner in corners], fill=fill)

    def front(self, x: float, y: float, x1: float, y1: float, fill: Color, z: float = 0.0) -> None:
        self.face([(x, y, z), (x1, y, z), (x1, y1, z), (x, y1, z)], fill)

    def flank(self, half: float, y: float, y1: float, z: float, z1: float, fill: Color) -> None:
        """The side that faces the camera, if one does."""
        if abs(self._x) < 0.5:
            return
        x = half if self._x < 0 else -half
        self.face([(x, y, z), (x, y, z1), (x, y1, z1), (x, y1, z)], fill)

    def roof(self, half: float, y: float, z: float, z1: float, fill: Color) -> None:
        self.face([(-half, y, z), (half, y, z), (half, y, z1), (-half, y, z1)], fill)

    def box(self, half: float, y: float, y1: float, z: float, z1: float, fill: Color) -> None:
        self.roof(half, y1, z, z1, _tone(fill, 1.12))
        self.flank(half, y, y1, z, z1, _tone(fill, 0.72))
        self.front(-half, y, half, y1, fill, z)

    def disc(
        self, x: float, y: float, rx: float, ry: float, fill: tuple[int, ...], z: float = 0.0
    ) -> None:
        column, row = self.at(x, y, z)
        scale = self.resolution * self._z / (self._z + z)
        box = (column - rx * scale, row - ry * scale, column + rx * scale, row + ry * scale)
        self.draw.ellipse(box, fill=fill)

    def line(self, points: list[tuple[float, float]], width: float, fill: Color) -> None:
        pixels = max(1, round(width * self.resolution))
        corners = [self.at(x, y, 0.0) for x, y in points]
        self.draw.line(corners, fill=fill, width=pixels, joint="curve")


def _tone(color: Color, factor: float) -> Color:
    """Lighter or darker; a little additive, so that black has edges too."""
    lift = 14 if factor > 1 else 0
    red, green, blue = (int(np.clip(c * factor + lift, 0, 255)) for c in color)
    return red, green, blue


def _lamps(pen: _Pen, half: float, y: float, view: str, phase: int, size: float = 0.3) -> None:
    if view == "parked":
        fill = _AMBER if phase else (122, 72, 40)
    else:
        fill = (255, 250, 214) if view == "approaching" else (255, 30, 30)
    for side in (-1, 1):
        pen.disc(side * (half - size), y, size, size * 0.8, fill)


def _car(pen: _Pen, paint: Color, view: str, phase: int) -> None:
    for side in (-1, 1):
        pen.front(side * 0.95 - 0.22, 0.0, side * 0.95 + 0.22, 0.6, _TYRE)
    pen.flank(1.2, 0.0, 0.6, 0.5, 1.2, _TYRE)
    pen.flank(1.2, 0.0, 0.6, 2.8, 3.5, _TYRE)
    pen.box(1.25, 0.32, 1.2, 0.0, 4.0, paint)
    near, far = (1.1, 3.2) if view == "approaching" else (0.4, 3.0)
    pen.flank(1.1, 1.2, 1.95, near, far, _GLASS)
    pen.roof(0.95, 1.95, near, far, _tone(paint, 1.1))
    low = near - 0.4
    pen.face([(-1.12, 1.2, low), (1.12, 1.2, low), (0.92, 1.92, near), (-0.92, 1.92, near)], _GLASS)
    pen.front(-0.45, 0.45, 0.45, 0.66, (226, 226, 214) if view != "approaching" else _TYRE)
    _lamps(pen, 1.22, 0.88, view, phase, 0.24)


def _truck(pen: _Pen, paint: Color, view: str, phase: int) -> None:
    for side in (-1, 1):
        pen.front(side * 0.95 - 0.28, 0.0, side * 0.95 + 0.28, 0.95, _TYRE)
    for z in (0.6, 4.4, 5.6):
        pen.flank(1.3, 0.0, 0.9, z, z + 0.9, _TYRE)
    if view == "approaching":
        pen.box(1.45, 0.8, 4.1, 2.0, 7.5, _tone(paint, 0.86))
        pen.box(1.25, 0.5, 2.9, 0.0, 1.7, paint)
        pen.front(-1.1, 1.75, 1.1, 2.7, _GLASS)
        pen.front(-0.8, 0.65, 0.8, 1.1, (74, 74, 78))
    else:
        pen.front(-1.3, 0.5, 1.3, 0.85, (58, 58, 62))
        pen.box(1.45, 0.95, 4.1, 0.0, 6.4, paint)
        for x in (-1.38, -0.05, 1.28):
            pen.front(x, 1.05, x + 0.1, 4.0, _tone(paint, 0.62))
        pen.front(-1.38, 2.3, 1.38, 2.42, _tone(paint, 0.62))
    _lamps(pen, 1.3, 0.72 if view != "approaching" else 0.95, view, phase, 0.26)


def _bus(pen: _Pen, paint: Color, view: str, phase: int) -> None:
    for side in (-1, 1):
        pen.front(side * 1.0 - 0.25, 0.0, side * 1.0 + 0.25, 0.6, _TYRE)
    for z in (1.5, 7.0):
        pen.flank(1.4, 0.0, 0.75, z, z + 1.2, _TYRE)
    pen.box(1.5, 0.35, 3.4, 0.0, 9.5, paint)
    for z in np.arange(0.4, 9.0, 1.5):
        pen.flank(1.52, 1.7, 2.85, float(z), float(z) + 1.2, _GLASS)
    pen.roof(0.8, 3.45, 3.0, 5.0, (222, 222, 222))
    pen.front(-1.36, 1.35, 1.36, 2.75, _GLASS)
    pen.front(-0.05, 1.35, 0.05, 2.75, _tone(paint, 0.6))
    pen.front(-0.95, 2.92, 0.95, 3.26, (255, 178, 44) if view == "approaching" else (50, 50, 54))
    _lamps(pen, 1.45, 0.85, view, phase, 0.26)


def _cyclist(pen: _Pen, paint: Color, view: str, phase: int) -> None:
    lean = 0.28 if pen.anchor[1] else 0.0
    for x, z, radius in ((0.5, 0.5, 0.5), (-lean, 0.0, 0.56)):
        pen.disc(x, 0.58, 0.34, radius, _TYRE, z)
        pen.disc(x, 0.58, 0.18, radius - 0.18, (150, 150, 150), z)
    pen.line([(-lean, 0.6), (0.2, 1.0), (0.5, 0.6)], 0.12, (70, 70, 74))
    pen.line([(-0.6, 1.42), (0.25, 1.42)], 0.13, (60, 60, 62))
    knee = (0.62, 0.96) if phase else (0.96, 0.62)
    for side, high in zip((-0.26, 0.34), knee, strict=True):
        pen.line([(side * 0.6, 1.35), (side * 1.5, high), (side, high - 0.5)], 0.26, (46, 46, 72))
    pen.face([(-0.5, 2.35, 0), (0.55, 2.35, 0), (0.42, 1.2, 0), (-0.34, 1.2, 0)], paint)
    pen.line([(-0.45, 2.2), (-0.72, 1.5)], 0.2, paint)
    pen.line([(0.5, 2.2), (0.72, 1.5)], 0.2, _tone(paint, 0.75))
    pen.disc(0.02, 2.68, 0.3, 0.36, (224, 178, 146))
    pen.face([(-0.34, 2.7, 0), (0.38, 2.7, 0), (0.3, 3.05, 0), (-0.26, 3.05, 0)], _tone(paint, 0.9))
    lamp = {"approaching": (255, 250, 214), "receding": (255, 30, 30)}.get(view, (120, 80, 50))
    pen.disc(0.0, 1.1, 0.18, 0.18, lamp)
    if view == "parked":
        pen.line([(0.55, 1.5), (0.95, 0.0)], 0.14, (60, 60, 62))


_DRAW = {"car": _car, "truck": _truck, "bus": _bus, "cyclist": _cyclist}


def lane_position(vehicle: Vehicle) -> float:
    """Metres from the middle of the road; parked vehicles hug the kerb side of their lane."""
    kerb = {"left": -0.6, "middle": 0.5, "right": 0.6}[vehicle.lane]
    return LANE_X[vehicle.lane] + (kerb if vehicle.motion == "parked" else 0.0)


@lru_cache(maxsize=1024)
def vehicle_sprite(vehicle: Vehicle) -> Sprite:
    """Two phases: lamps off and on when parked, pedals of a cyclist; otherwise equal."""
    camera = Camera(96, "straight", 0)
    x, z = lane_position(vehicle), DEPTH[vehicle.distance]
    flank = 0.0 if abs(x) < 0.5 else 2.6
    box = (-1.9 - flank * (x > 0), -5.0, 1.9 + flank * (x < 0), 0.6)
    phases = []
    for phase in (0, 1):
        layers = []
        for paint in (PAINT[vehicle.color], _SENSED_PAINT):
            pen = _Pen(camera, x, z, box)
            half = 0.7 if vehicle.kind == "cyclist" else 1.5
            ground = [(-half, 0, -0.3), (half + 0.15, 0, -0.3), (half, 0, 3.0), (-half, 0, 3.0)]
            pen.face([(x, y, float(z)) for x, y, z in ground], (0, 0, 0, 110))
            _DRAW[vehicle.kind](pen, paint, vehicle.motion, phase)
            layers.append(np.asarray(pen.image, np.float32) / 255)
        phases.append(_pack(layers[0], layers[1]))
    return _finish(phases, pen.anchor, pen.resolution)


def _pack(
    seen: Float[np.ndarray, "h w 4"], sensed: Float[np.ndarray, "h w 4"]
) -> Float[np.ndarray, "h w 5"]:
    alpha = seen[..., 3:4]
    grey = luma(sensed[..., :3])[..., None]
    return np.concatenate([seen[..., :3] * alpha, alpha, grey * alpha], axis=-1)


def _finish(
    phases: list[Float[np.ndarray, "h w 5"]], anchor: tuple[float, float], resolution: float
) -> Sprite:
    """Filter to the size of a picture pixel, and crop to one transparent pixel around."""
    soft = np.stack([_soften(phase) for phase in phases])
    shown = soft[..., 3].max(axis=0) > 0
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    top, left = int(rows[0]) - 1, int(columns[0]) - 1
    soft = soft[:, top : int(rows[-1]) + 2, left : int(columns[-1]) + 2]
    _, height, width, _ = soft.shape
    texture = np.ascontiguousarray(soft.reshape(-1, 5).T, np.float32)
    row, column = anchor[0] + _OVERSAMPLING - top, anchor[1] + _OVERSAMPLING - left
    return Sprite(texture, height, width, (row, column), len(phases), resolution)


def _soften(picture: Float[np.ndarray, "h w 5"]) -> Float[np.ndarray, "h2 w2 5"]:
    pad = _OVERSAMPLING
    picture = np.pad(picture, ((pad, pad), (pad, pad), (0, 0)))
    for axis in (0, 1):
        picture = np.mean([np.roll(picture, k, axis) for k in (-1, 0, 1, 2)], axis=0)
    return picture


@lru_cache(maxsize=64)
def pedestrian_sprite(direction: str, variant: int) -> Sprite:
    """Someone walking to the left or right: four phases of a stride, 1.9 m tall."""
    rng = np.random.default_rng([variant, 41])
    coat = _COATS[int(rng.integers(len(_COATS)))]
    sign = 1.0 if direction == "right" else -1.0
    phases = []
    for phase in range(4):
        pen = _Pen(Camera(96, "straight", 0), 0.0, 7.0, (-1.2, -2.6, 1.2, 0.5))
        swing = (0.62, 0.18, -0.5, -0.1)[phase]
        pen.disc(0.0, 0.02, 0.7, 0.14, (0, 0, 0, 110))
        for leg in (swing, -swing):
            knee = leg * 0.6 + 0.08 * sign
            pen.line([(0.0, 1.02), (knee, 0.55), (leg, 0.04)], 0.24, (40, 44, 66))
            pen.line([(leg, 0.05), (leg + 0.2 * sign, 0.05)], 0.14, (24, 20, 20))
        pen.line([(0.0, 1.7), (-swing * 0.7, 1.1)], 0.2, _tone(coat, 0.7))
        pen.face([(-0.3, 1.82, 0), (0.3, 1.82, 0), (0.34, 0.9, 0), (-0.34, 0.9, 0)], coat)
        pen.line([(0.0, 1.7), (swing * 0.7, 1.12)], 0.2, _tone(coat, 0.85))
        pen.disc(0.08 * sign, 2.1, 0.25, 0.29, (228, 182, 150))
        pen.disc(-0.04 * sign, 2.22, 0.26, 0.2, (60, 40, 30))
        picture = np.asarray(pen.image, np.float32) / 255
        phases.append(_pack(picture, picture))
    return _finish(phases, pen.anchor, pen.resolution)


@lru_cache(maxsize=8)
def light_sprite(state: str, time: str) -> Sprite:
    """A traffic light on an arm; its lamps look alike to the event sensor whichever is lit."""
    layers = []
    for lit in (state, "neither"):
        pen = _Pen(Camera(96, "straight", 0), 0.0, 9.0, (-1.9, -6.0, 3.6, 4.5))
        steel: Color = (96, 100, 106) if time != "night" else (70, 76, 96)
        pen.line([(0.0, 5.0), (3.5, 5.0)], 0.5, steel)
        pen.front(-1.05, 1.4, 1.05, 5.6, (36, 40, 42))
        pen.front(-0.92, 1.53, 0.92, 5.47, (20, 22, 22))
        for name, y, on, off in (
            ("red", 4.5, (255, 30, 24), (66, 20, 20)),
            ("green", 2.5, (30, 255, 110), (16, 56, 32)),
        ):
            if lit == name:
                pen.disc(0.0, y, 0.9, 0.9, _tone(on, 0.55))
            pen.disc(0.0, y, 0.8, 0.8, on if lit == name else off)
            if lit == "neither":
                pen.disc(0.0, y, 0.8, 0.8, (150, 150, 150))
        layers.append(np.asarray(pen.image, np.float32) / 255)
    return _finish([_pack(layers[0], layers[1])], pen.anchor, pen.resolution)

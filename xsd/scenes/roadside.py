"""What stands beside the road: an upright plane on either side, whose texture scrolls past."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

from xsd.scenes.backdrop import Color, ambient, luma
from xsd.scenes.camera import Camera, roadside_plane

PLANE_LENGTH_M = 32.0
PLANE_HEIGHT_M = 9.0
PLANE_BINS = (1024, 72)
"""Texture cells along the road and up: about 3 and 12 cm."""
NUM_MIPS = 5
GAP_M = 8.5
"""Opening of the roadside at a crossing."""
PLANE_X: dict[str, float] = {"trees": 6.4, "houses": 6.6, "fields": 5.6, "walls": 5.6}
"""Distance of the roadside plane from the middle of the road, metres."""


@lru_cache(maxsize=128)
def plane_texture(
    roadside: str, time: str, variant: int, gap: bool
) -> Float[np.ndarray, "5 cells"]:
    """The roadside as a scrolling billboard, filtered for five distances.

    Returns:
        Premultiplied red, green, blue, then alpha and premultiplied luma, of cell
        ``(mip * up + height) * along + depth``. With ``gap`` a side road opens its first metres.
    """
    along, up = PLANE_BINS
    zoom = 2
    image = Image.new("RGBA", (along * zoom, up * zoom), (0, 0, 0, 0))
    rng = np.random.default_rng([variant, 23])
    pen = _Pen(ImageDraw.Draw(image), zoom)
    {"trees": _trees, "houses": _houses, "fields": _fields, "walls": _walls}[roadside](pen, rng)
    by_day = np.asarray(image.resize((along, up), Image.Resampling.BOX), np.float32) / 255
    # Lit windows are seen by the frames only: the luma is the daylight drawing's.
    rgb = by_day[..., :3] * ambient(time)
    if time != "day" and roadside == "houses":
        glow = (by_day[..., 2] > by_day[..., 0] + 0.08)[..., None]
        lit = np.array([1.0, 0.86, 0.46], np.float32) * (0.95 if time == "night" else 0.8)
        rgb = np.where(glow, lit, rgb)
    grey = luma(by_day[..., :3] * ambient(time))
    packed = np.concatenate([rgb, np.ones_like(grey)[..., None], grey[..., None]], axis=-1)
    packed *= by_day[..., 3:4]
    packed = packed[::-1]
    if gap:
        packed[:, : int(GAP_M / PLANE_LENGTH_M * along)] = 0
    mips = [_blur(packed, 5.0 * 2.0**k, 1.0 * 1.5**k) for k in range(NUM_MIPS)]
    return np.ascontiguousarray(np.stack(mips).reshape(-1, 5).T, np.float32)


@lru_cache(maxsize=128)
def plane_cells(
    camera: Camera, roadside: str
) -> tuple[
    Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]
]:
    """Rows, columns, first cell of texture, and place along the road in cells, of its pixels."""
    x = PLANE_X[roadside]
    row, column, depth, high = roadside_plane(camera, x, PLANE_HEIGHT_M)
    along, up = PLANE_BINS
    footprint = depth**2 / (camera.focal * x)
    mip = np.clip(np.round(np.log2(footprint / 0.16)), 0, NUM_MIPS - 1).astype(np.intp)
    level = np.clip(high / PLANE_HEIGHT_M * up, 0, up - 1).astype(np.intp)
    cells = depth * (along / PLANE_LENGTH_M)
    return row, column, (mip * up + level) * along, cells.astype(np.float32)


def _blur(
    texture: Float[np.ndarray, "up along 5"], along: float, up: float
) -> Float[np.ndarray, "up along 5"]:
    """Box filter of the given widths in cells; wraps along the road."""
    for axis, width in ((1, along), (0, up)):
        reach = round((width - 1) / 2)
        if reach < 1:
            continue
        pad = [(0, 0)] * 3
        pad[axis] = (reach + 1, reach)
        total = np.cumsum(np.pad(texture, pad, mode="wrap" if axis else "edge"), axis=axis)
        span = 2 * reach + 1
        high = np.take(total, np.arange(span, total.shape[axis]), axis=axis)
        low = np.take(total, np.arange(0, total.shape[axis] - span), axis=axis)
        texture = (high - low) / span
    return texture


class _Pen:
    """Draws on a plane in metres: z along the road, y up."""

    def __init__(self, draw: ImageDraw.ImageDraw, zoom: int) -> None:
        self._draw = draw
        self._along = zoom * PLANE_BINS[0] / PLANE_LENGTH_M
        self._up = zoom * PLANE_BINS[1] / PLANE_HEIGHT_M

    def _points(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(z * self._along, (PLANE_HEIGHT_M - y) * self._up) for z, y in points]

    def box(self, z: float, y: float, z1: float, y1: float, fill: Color) -> None:
        (left, top), (right, bottom) = self._points([(z, y1), (z1, y)])
        self._draw.rectangle((left, top, right, bottom), fill=fill)

    def disc(self, z: float, y: float, rz: float, ry: float, fill: Color) -> None:
        (left, top), (right, bottom) = self._points([(z - rz, y + ry), (z + rz, y - ry)])
        self._draw.ellipse((left, top, right, bottom), fill=fill)

    def shape(self, points: list[tuple[float, float]], fill: Color) -> None:
        self._draw.polygon(self._points(points), fill=fill)


def _jitter(color: Color, rng: np.random.Generator, amount: int = 16) -> Color:
    shift = rng.integers(-amount, amount + 1)
    red, green, blue = (int(np.clip(c + shift, 0, 255)) for c in color)
    return red, green, blue


def _trees(pen: _Pen, rng: np.random.Generator) -> None:
    for slot in range(8):
        z = slot * 4.0 + 2.0 + rng.uniform(-0.4, 0.4)
        green = _jitter((52, 118, 50), rng, 22)
        dark = _jitter((34, 82, 38), rng, 8)
        pen.box(z - 0.22, 0.0, z + 0.22, 3.0, (94, 66, 44))
        high = rng.uniform(6.6, 8.4)
        if (slot + int(rng.integers(2))) % 2:
            for base, width in ((1.6, 1.65), (3.2, 1.3), (4.8, 0.9)):
                tip = base + (high - base) * 0.62
                pen.shape([(z - width, base), (z + width, base), (z, tip)], green)
                pen.shape([(z - width, base), (z - width * 0.2, base), (z, tip)], dark)
        else:
            pen.disc(z, high - 2.4, 1.7, 2.3, dark)
            pen.disc(z + 0.25, high - 2.0, 1.35, 1.8, green)
            pen.disc(z + 0.5, high - 1.5, 0.6, 0.7, _jitter((96, 158, 74), rng))


def _houses(pen: _Pen, rng: np.random.Generator) -> None:
    fronts = [(214, 196, 164), (188, 118, 96), (222, 216, 206), (170, 150, 128), (202, 168, 112)]
    for slot in range(4):
        z, width = slot * 8.0 + 0.5, 7.0
        front = _jitter(fronts[int(rng.integers(len(fronts)))], rng)
        high = rng.uniform(4.6, 5.8)
        pen.box(z, 0.0, z + width, high, front)
        roof = _jitter((142, 62, 48), rng)
        ridge = high + rng.uniform(1.8, 2.8)
        pen.shape(
            [(z - 0.4, high), (z + width + 0.4, high), (z + width - 1.8, ridge), (z + 1.8, ridge)],
            roof,
        )
        pen.box(z + 4.6, ridge - 0.9, z + 5.3, min(ridge + 0.7, 8.9), (98, 60, 52))
        for floor in (0.9, 3.0):
            for window in range(3):
                at = z + 0.8 + window * 2.1
                if floor < 1 and window == 1:
                    pen.box(at + 0.1, 0.0, at + 1.2, 2.2, (92, 60, 40))
                    continue
                pen.box(at - 0.15, floor - 0.15, at + 1.35, floor + 1.5, (240, 236, 228))
                pen.box(at, floor, at + 1.2, floor + 1.35, (66, 84, 112))


def _fields(pen: _Pen, rng: np.random.Generator) -> None:
    for slot in range(16):
        z = slot * 2.0 + 1.0
        pen.box(z - 0.14, 0.0, z + 0.14, 1.3, (120, 84, 52))
    for y in (0.5, 1.0):
        pen.box(0.0, y - 0.07, PLANE_LENGTH_M, y + 0.07, (150, 112, 74))
    for slot in range(3):
        z = slot * 10.0 + rng.uniform(2, 6)
        pen.disc(z, 0.95, 1.05, 0.95, (218, 178, 74))
        pen.disc(z, 0.95, 0.6, 0.55, (184, 140, 54))


def _walls(pen: _Pen, rng: np.random.Generator) -> None:
    tone = [(156, 110, 92), (150, 144, 138), (134, 128, 146)][int(rng.integers(3))]
    for slot in range(8):
        z = slot * 4.0
        pen.box(z, 0.0, z + 4.0, 5.3, _jitter(tone, rng, 14))
        for course in range(6):
            pen.box(
                z, course * 0.9 - 0.05, z + 4.0, course * 0.9 + 0.05, _jitter((98, 84, 78), rng, 4)
            )
            offset = 1.0 if course % 2 else 2.0
            for brick in (offset, offset + 2.0):
                pen.box(
                    z + brick - 0.06,
                    course * 0.9,
                    z + brick + 0.06,
                    course * 0.9 + 0.9,
                    (98, 84, 78),
                )
        pen.box(z - 0.25, 0.0, z + 0.25, 5.6, (112, 104, 100))
    pen.box(0.0, 5.2, PLANE_LENGTH_M, 5.55, (196, 190, 182))

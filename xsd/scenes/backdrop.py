"""What lies behind and below everything: sky, ground, and the light that falls on both."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFilter

from xsd.scenes.camera import ROAD_HALF_WIDTH, Camera

Color = tuple[int, int, int]

AMBIENT: dict[str, Color] = {
    "day": (255, 255, 255),
    "dusk": (226, 172, 160),
    "night": (84, 92, 138),
}
"""Colour of the light that falls on everything."""
ASPHALT: Color = (92, 94, 100)
_SKY: dict[str, tuple[Color, Color]] = {
    "day": ((84, 150, 226), (206, 228, 244)),
    "dusk": ((72, 52, 118), (255, 150, 84)),
    "night": ((6, 9, 28), (30, 38, 78)),
}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
VERGE: dict[str, tuple[Color, Color]] = {
    "trees": ((88, 134, 66), (72, 116, 56)),
    "houses": ((176, 168, 158), (158, 150, 142)),
    "fields": ((208, 182, 84), (112, 150, 58)),
    "walls": ((142, 142, 140), (128, 128, 128)),
}
"""Two tones of the ground beside the road."""


def luma(rgb: Float[np.ndarray, "*any 3"]) -> Float[np.ndarray, "*any"]:
    """Rec. 601 luma."""
    return np.asarray(rgb @ _LUMA)


def ambient(time: str) -> Float[np.ndarray, " 3"]:
    return np.array(AMBIENT[time], np.float32) / 255


@lru_cache(maxsize=128)
def sky(camera: Camera, time: str, roadside: str) -> Float[np.ndarray, "H W 3"]:
    """Sky with sun or moon, clouds or stars, and hills or roofs along the horizon."""
    rng = np.random.default_rng([camera.variant, 11])
    size, zoom = camera.canvas, 4
    top, bottom = (np.array(color, np.float32) for color in _SKY[time])
    fall = np.clip(np.arange(size * zoom) / (camera.horizon * zoom), 0, 1)[:, None, None] ** 1.3
    gradient = np.broadcast_to(top + (bottom - top) * fall, (size * zoom, size * zoom, 3))
    image = Image.fromarray(gradient.astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    edge, line = size * zoom, camera.horizon * zoom
    if time == "night":
        for x, y in zip(rng.uniform(0, edge, 40), rng.uniform(0, line * 0.8, 40), strict=True):
            draw.ellipse((x - 1.6, y - 1.6, x + 1.6, y + 1.6), fill=(250, 250, 220, 210))
    else:
        for _ in range(5):
            _cloud(
                draw,
                rng,
                edge,
                line,
                (255, 255, 255, 120) if time == "day" else (255, 176, 150, 90),
            )
    x, y = rng.uniform(0.15, 0.5) * edge, line * (0.85 if time == "dusk" else 0.3)
    radius = edge * (0.055 if time == "dusk" else 0.035)
    disc = {"day": (255, 250, 205), "dusk": (255, 226, 130), "night": (240, 240, 214)}[time]
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=disc)
    _horizon(draw, rng, edge, line, time, roadside)
    image = image.filter(ImageFilter.GaussianBlur(1.2)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def _cloud(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    edge: float,
    line: float,
    fill: tuple[int, ...],
) -> None:
    x, y, width = rng.uniform(0, edge), rng.uniform(0.08, 0.7) * line, rng.uniform(0.08, 0.2) * edge
    for _ in range(4):
        dx, high = rng.uniform(-0.6, 0.6) * width, rng.uniform(0.12, 0.22) * width
        draw.ellipse((x + dx - width / 2, y - high, x + dx + width / 2, y + high), fill=fill)


def _horizon(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    edge: float,
    line: float,
    time: str,
    roadside: str,
) -> None:
    hill = _shade((108, 132, 150) if roadside != "houses" else (134, 134, 146), time)
    if roadside in ("houses", "walls"):
        x = 0.0
        while x < edge:
            width, high = rng.uniform(0.02, 0.06) * edge, rng.uniform(0.02, 0.09) * edge
            draw.rectangle((x, line - high, x + width, line + 2), fill=hill)
            x += width
        return
    phase = rng.uniform(0, 6, 3)
    at = np.linspace(0, edge, 60)
    wave = sum(np.sin(at / edge * k * 5 + p) / k for k, p in zip((1, 2, 4), phase, strict=True))
    high = (0.045 + 0.022 * wave) * edge
    points = [
        (0.0, line + 2),
        *zip(at.tolist(), (line - high).tolist(), strict=True),
        (edge, line + 2),
    ]
    draw.polygon(points, fill=hill)


def _shade(color: Color, time: str) -> Color:
    red, green, blue = (int(c * a / 255) for c, a in zip(color, AMBIENT[time], strict=True))
    return red, green, blue


@lru_cache(maxsize=128)
def ground(
    camera: Camera, roadside: str
) -> tuple[dict[str, Float[np.ndarray, "rows W 1"]], Float[np.ndarray, "rows W 3"]]:
    """Coverage of the canvas below the horizon by parts of the road; road and verge in colour."""
    rows = np.arange(int(np.ceil(camera.horizon)), camera.canvas) + 0.5
    depth = camera.depth(rows)[:, None]
    columns = np.arange(camera.canvas)[None, :]

    def strip(left: float, right: float) -> Float[np.ndarray, "rows W"]:
        first, last = camera.column(left, depth), camera.column(right, depth)
        return np.asarray((np.minimum(columns + 1, last) - np.maximum(columns, first)).clip(0, 1))

    half = ROAD_HALF_WIDTH
    away = (columns + 0.5 - camera.canvas / 2 - camera.bend(depth)) * depth / camera.focal
    mask = {
        "road": strip(-half, half),
        "kerb": strip(-half - 0.45, -half) + strip(half, half + 0.45),
        "edge": strip(-half + 0.12, -half + 0.34) + strip(half - 0.34, half - 0.12),
        "dash": strip(-1.72, -1.48) + strip(1.48, 1.72),
        "zebra": np.sum([strip(x - 0.35, x + 0.35) for x in np.arange(-4.2, 4.3, 1.4)], axis=0),
        "grain": np.sin(away * 2.1 + 1.0) * np.cos(away * 0.83),
        "patch": np.cos(away * 1.3 + 0.5),
    }
    rows_of_crops = np.clip(0.5 + 1.5 * np.sin(np.abs(away) * 2 * np.pi / 3.2), 0, 1)
    pattern = rows_of_crops if roadside == "fields" else 0.5 + 0.25 * mask["grain"]
    layers = {name: layer[..., None].astype(np.float32) for name, layer in mask.items()}
    verge, other, asphalt = (
        np.array(color, np.float32) / 255 for color in (*VERGE[roadside], ASPHALT)
    )
    beside = verge + (other - verge) * pattern[..., None].astype(np.float32)
    return layers, beside + (asphalt - beside) * layers["road"]


@lru_cache(maxsize=128)
def headlights(camera: Camera, time: str) -> Float[np.ndarray, "rows W 1"]:
    """By what our own lamps brighten the ground ahead."""
    rows = np.arange(int(np.ceil(camera.horizon)), camera.canvas)[:, None] + 0.5
    columns = np.arange(camera.canvas)[None, :] + 0.5
    across = (columns - camera.column(0.0, camera.depth(rows))) / (0.42 * camera.size)
    along = (rows - 0.8 * camera.size) / (0.34 * camera.size)
    gain = {"day": 0.0, "dusk": 0.25, "night": 1.0}[time]
    pool = 1 + gain * np.exp(-(across**2) - along**2)
    return np.asarray(pool[..., None], np.float32)

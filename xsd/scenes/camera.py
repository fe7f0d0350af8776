"""The ego camera of synthetic scenes: a pinhole above a flat, possibly bending, three-lane road."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

FPS = 20
NUM_FRAMES = 20
DURATION_US = 1_000_000
MARGIN = 3
"""Pixels rendered around the picture, so that camera shake never shows an edge."""
EGO_SPEED = 2.4
"""Metres a second: slow, so that one second changes no fact about what is near or far."""
LANE_X = {"left": -3.2, "middle": 0.0, "right": 3.2}
ROAD_HALF_WIDTH = 4.9
DEPTH = {"near": 8.0, "far": 14.5}
"""Distance in metres at the middle of the clip."""
BEND = {"straight": 0.0, "left_curve": -0.34, "right_curve": 0.34, "crossing": 0.0}
"""Sideways shift of the vanishing point, as a fraction of the picture."""


@dataclass(frozen=True)
class Camera:
    """Projects the road (x right, y up, z ahead, in metres) to rows and columns of pixels."""

    size: int
    road: str
    variant: int
    """Appearance of the recording: here, how high the camera looks."""

    @property
    def canvas(self) -> int:
        return self.size + 2 * MARGIN

    @property
    def focal(self) -> float:
        return 0.68 * self.size

    @property
    def height(self) -> float:
        return 4.8

    @property
    def horizon(self) -> float:
        return MARGIN + self.size * (0.36 + 0.01 * (self.variant % 3 - 1))

    @property
    def nearest(self) -> float:
        """Depth seen at the lower edge of the picture."""
        return self.focal * self.height / (self.size + MARGIN - self.horizon)

    def bend(self, z: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """Columns by which the road has turned away at depth z."""
        away = np.clip(1.0 - self.nearest / z, 0.0, None) ** 2
        return BEND[self.road] * self.size * away

    def column(
        self, x: float | Float[np.ndarray, "*any"], z: Float[np.ndarray, "*any"]
    ) -> Float[np.ndarray, "*any"]:
        return np.asarray(self.canvas / 2 + self.focal * x / z + self.bend(z))

    def row(self, y: float, z: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        return self.horizon + self.focal * (self.height - y) / z

    def depth(self, row: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """Depth of the ground at a row below the horizon; far away above it."""
        return self.focal * self.height / np.maximum(row - self.horizon, 0.3)


def roadside_plane(
    camera: Camera, x: float, top: float
) -> tuple[
    Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, " n"]
]:
    """Where the two upright planes at ``-x`` and ``+x`` are seen.

    Returns:
        rows, columns, depth (metres) and height (metres) of every canvas pixel that shows one.
    """
    steps = np.geomspace(camera.nearest * 0.5, 90.0, 3000)
    middle = np.arange(camera.canvas) + 0.5
    depth = np.full(camera.canvas, np.inf)
    for side in (-1.0, 1.0):
        at = camera.column(side * x, steps)
        # The first crossing is what is seen: on the inside of a bend the plane hides itself.
        beyond = (middle[:, None] - at[None, :]) * side >= 0
        hit = np.where(beyond.any(axis=1), steps[beyond.argmax(axis=1)], np.inf)
        depth = np.minimum(depth, hit)
    high = camera.height - (middle[:, None] - camera.horizon) * depth / camera.focal
    rows, columns = np.nonzero(np.isfinite(depth) & (high >= 0) & (high < top))
    return rows, columns, depth[columns], high[rows, columns]

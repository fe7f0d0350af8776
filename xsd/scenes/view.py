"""What all painters of a scene share: the view they paint, and how one thing covers another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from xsd.scenes import backdrop
from xsd.scenes.camera import EGO_SPEED, Camera
from xsd.scenes.facts import Facts


@dataclass(frozen=True)
class View:
    """What the painters share: facts, camera, the clip's own random place, and the instants."""

    facts: Facts
    camera: Camera
    phase: float
    """Random place along the road, metres."""
    channels: tuple[int, ...]
    """Rows of a packed texture that are painted: (0, 1, 2) colours or (4,) luma."""
    seconds: Float[np.ndarray, " T"]

    @property
    def travel(self) -> Float[np.ndarray, " T"]:
        """Metres driven, relative to the middle of the clip."""
        return EGO_SPEED * (self.seconds - 0.5)

    def tint(self, rgb: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "C ..."]:
        """A colour, or a picture, as planes of the channels painted."""
        planes = np.moveaxis(rgb, -1, 0) if len(self.channels) == 3 else backdrop.luma(rgb)[None]
        return np.ascontiguousarray(planes, np.float32)


def over(
    area: Float[np.ndarray, "C ..."],
    view: View,
    texture: Float[np.ndarray, "5 cells"],
    index: Int[np.ndarray, ...],
    gain: Float[np.ndarray, " C"] | None = None,
) -> None:
    """Premultiplied 'over', in place."""
    keep = 1 - texture[3].take(index)
    for k, channel in enumerate(view.channels):
        shown = texture[channel].take(index)
        if gain is not None:
            shown *= gain[k]
        area[k] *= keep
        area[k] += shown

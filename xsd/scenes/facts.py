"""What is true of a synthetic scene: the vocabulary that pictures, events and answers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

TIMES = ("day", "dusk", "night")
ROADS = ("straight", "left_curve", "right_curve", "crossing")
ROADSIDES = ("trees", "houses", "fields", "walls")
LIGHTS = ("none", "red", "green")
PEDESTRIANS = ("none", "left", "right")
KINDS = ("car", "truck", "bus", "cyclist")
COLORS = ("red", "blue", "white", "black", "yellow", "green")
LANES = ("left", "middle", "right")
MOTIONS = ("approaching", "receding", "parked")
DISTANCES = ("near", "far")


@dataclass(frozen=True, slots=True)
class Vehicle:
    kind: str
    color: str
    lane: str
    motion: str
    distance: str


@dataclass(frozen=True, slots=True)
class Facts:
    """The ground truth of one clip.

    An event camera sees change only: of these it can tell road, kind, lane, distance and motion
    (through the camera's own movement), roadside and pedestrians by their outlines, but not
    colours, not the state of a traffic light, and hardly the time of day.
    """

    time: str
    road: str
    roadside: str
    light: str
    pedestrian: str
    vehicles: tuple[Vehicle, ...]
    """One to three, at most one a lane, from left to right."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Facts:
        vehicles = tuple(Vehicle(**vehicle) for vehicle in value["vehicles"])
        return cls(**{**value, "vehicles": vehicles})

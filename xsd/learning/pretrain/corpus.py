"""Synthetic clips as both models see them, and the facts as numbers to be learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from xsd.learning.pretrain.config import PretrainConfig
from xsd.pairs import tiny
from xsd.scenes import facts as f
from xsd.scenes.facts import Facts
from xsd.scenes.language import House
from xsd.scenes.synthetic import sample_facts, scene_tensors


@dataclass(frozen=True)
class Corpus:
    """Clips as both models see them: facts, and images after resize and crop."""

    facts: list[Facts]
    frames: UInt8[np.ndarray, "clips N H W 3"]
    events: UInt8[np.ndarray, "clips M H W 3"]


def make_corpus(config: PretrainConfig, num_clips: int, first_recording: int) -> Corpus:
    """Render clips of whole recordings; equal for any number of processes."""
    jobs = [
        (config, first_recording + index // config.clips_per_recording, index)
        for index in range(num_clips)
    ]
    # A chunk is a recording: what its clips share is drawn once.
    chunk = config.clips_per_recording
    with ProcessPoolExecutor(config.num_workers, mp_context=get_context("spawn")) as pool:
        clips = list(pool.map(_make_clip, jobs, chunksize=chunk))
    facts, frames, events = zip(*clips, strict=True)
    return Corpus(list(facts), np.stack(frames), np.stack(events))


def clip_facts(config: PretrainConfig, num_clips: int, first_recording: int) -> Iterator[Facts]:
    """The facts of ``make_corpus``, without the pictures."""
    for index in range(num_clips):
        recording = first_recording + index // config.clips_per_recording
        yield _draw(config, recording, index)[0]


def _draw(config: PretrainConfig, recording: int, index: int) -> tuple[Facts, int]:
    """Facts of a clip and the seed of its picture."""
    of_recording = sample_facts(np.random.default_rng((config.seed, recording)))
    rng = np.random.default_rng((config.seed, recording, index))
    return sample_facts(rng, of_recording), int(rng.integers(2**31))


def _make_clip(
    job: tuple[PretrainConfig, int, int],
) -> tuple[Facts, UInt8[np.ndarray, "N H W 3"], UInt8[np.ndarray, "M H W 3"]]:
    config, recording, index = job
    facts, seed = _draw(config, recording, index)
    appearance = int(np.random.default_rng((config.seed, recording, 1)).integers(2**31))
    frames, events = scene_tensors(
        facts, seed, config.frame_size, tiny.NUM_EVENT_IMAGES, appearance
    )
    resize = tiny.processing().resize_and_crop
    return facts, np.stack([resize(x) for x in frames]), np.stack([resize(x) for x in events])


def normalise(images: UInt8[Tensor, "*batch H W 3"]) -> Float[Tensor, "*batch 3 H W"]:
    """Resized and cropped bytes to pixel values, as the image processor does it."""
    processing = tiny.processing()
    mean, std = torch.tensor(processing.mean), torch.tensor(processing.std)
    pixels = images.float() * processing.rescale_factor - mean.to(images.device)
    return (pixels / std.to(images.device)).movedim(-1, -3)


Slots = dict[str, tuple[str, ...]]
"""What can be asked about a scene, with the answers that there are."""

_EVERY: Slots = {
    "time": f.TIMES,
    "road": f.ROADS,
    "roadside": f.ROADSIDES,
    "light": f.LIGHTS,
    "pedestrian": f.PEDESTRIANS,
} | {
    f"{lane}.{name}": ("empty", *values)
    for lane in f.LANES
    for name, values in (
        ("kind", f.KINDS),
        ("color", f.COLORS),
        ("motion", f.MOTIONS),
        ("distance", f.DISTANCES),
    )
}
_UNSEEN_BY_EVENTS = ("time", "light", "color")
SLOTS: dict[House, Slots] = {
    "verifier": _EVERY,
    "drafter": {
        name: values
        for name, values in _EVERY.items()
        if name.rpartition(".")[2] not in _UNSEEN_BY_EVENTS
    },
}


def label_facts(facts: Sequence[Facts], slots: Slots) -> Int[Tensor, "clips slots"]:
    """Which of a slot's answers is true, clip by clip."""
    return torch.tensor(
        [[values.index(_value(fact, slot)) for slot, values in slots.items()] for fact in facts]
    )


def _value(facts: Facts, slot: str) -> str:
    lane, _, name = slot.rpartition(".")
    if not lane:
        return str(getattr(facts, name))
    found = [vehicle for vehicle in facts.vehicles if vehicle.lane == lane]
    return str(getattr(found[0], name)) if found else "empty"

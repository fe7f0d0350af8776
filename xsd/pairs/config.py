"""Which pair, from where, in which precision. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xsd.errors import XsdError

QUANTS = ("4bit", "8bit", "fp16", "bf16", "fp32")


@dataclass(frozen=True)
class PairConfig:
    """The model pair of a stage."""

    pair: str = "tiny"
    """tiny (embedded), lab, eventgpt-video-llava, or a module with a pair (docs/pairs.md)."""
    drafter: str | None = None
    """Folder or hub id of the drafter; null: the pair's own default."""
    verifier: str | None = None
    """Folder or hub id of the verifier; null: the pair's own default."""
    tower: str | None = None
    """Folder of the drafter's CLIP JSON files; null: where its config.json says, or built in."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """random: drawn on the device at the real (or the folders') configuration, for timing."""
    quant: str | None = None
    """4bit, 8bit, fp16, bf16 or fp32; null: the pair's own default."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the first GPU, else the CPU."""
    device_map: str | None = None
    """A device for each, as drafter=cuda:1,verifier=cuda:0; null: both on --device."""
    num_event_images: int = 5
    """Images the events are shown to the drafter in; 1 takes the data set's event_image_1f."""

    def __post_init__(self) -> None:
        if self.quant is not None and self.quant not in QUANTS:
            raise XsdError(f"--quant {self.quant}: choose one of {', '.join(QUANTS)}")
        if self.num_event_images < 1:
            raise XsdError(f"--num_event_images {self.num_event_images}: must be at least 1")

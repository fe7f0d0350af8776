"""The records that rooms hand to each other, and the legend of the axes in all shapes. Torch-free.

Axes, as they are spelled in every signature:

====  =====================================================================================
B     sequences in a batch
T     answer positions (EOS is one of them)
Dd    width of the drafter's hidden states
Dv    width of the verifier's hidden states
K     pooled visual vectors kept for a clip (at most 128)
V     vocabulary rows
R     rows of one cached step (new tokens in one pass)
N     images of a clip (event images or video frames)
P     prompt positions, visual tokens included
====  =====================================================================================

Positions: all hidden states are taken after the final norm. ``h[t]`` is the state that predicted
answer token ``y[t]``; ``h[0]`` therefore sits at the prompt's last position. Drafter states are
written ``e[t]``, verifier states ``v[t]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
Conditioning = Literal["teacher_forced", "free_running"]


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip of one second: its files, and what is in it if we made it ourselves."""

    recording: str
    clip: int
    split: Split
    events: Path | None
    event_images: tuple[Path, ...]
    event_image_1f: Path | None
    video: Path
    """An MP4 file, or a folder of frames."""
    facts: Mapping[str, Any] | None = None
    """Ground truth of a synthetic scene (``scenes.facts.Facts.as_dict``); None otherwise."""

    @property
    def key(self) -> str:
        """``recording/000012``: unique in a data set, and the unit of splitting and of storage."""
        return f"{self.recording}/{self.clip:06d}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one scene."""

    scene: Scene
    question_index: int
    question: str

    @property
    def key(self) -> str:
        return f"{self.scene.key}/q{self.question_index}"


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What ``learning.fit`` yields after every epoch."""

    epoch: int
    step: int
    """Optimizer steps so far: the axis of every training curve."""
    learning_rate: float
    train: Mapping[str, float]
    val: Mapping[str, float]
    is_best: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Strategy:
    """One row of the benchmark: what drafts in the prefill gap, and what drafts after it."""

    name: str
    gap: str | None = None
    """A level, or the control ``drafter`` or ``template``; None: the gap is not used."""
    gap_mode: Literal["coupled", "free"] = "coupled"
    head: str | None = None
    """A level or control that drafts in decode; ``drafter``: what drafts in the gap goes on; None:
    plain decoding after the gap."""
    gamma: int = 0
    """Drafts per verifier call in decode."""
    tree: bool = False
    """The head drafts trees, not chains."""
    shuffled_events: bool = False
    """Control: the drafter sees another scene's events."""


@dataclass(frozen=True, slots=True)
class Span:
    """One bar of a sample's timeline, in milliseconds since the sample's clock started."""

    lane: Literal["drafter", "verifier"]
    what: str
    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class Trace:
    """One sample decoded by one strategy, as measured. All times in milliseconds."""

    sample_key: str
    strategy: str
    repeat: int
    question: str
    token_ids: tuple[int, ...]
    text: str
    prefill_ms: float
    """Clock start to the verifier's first logits: processors, vision towers, prefill, waits."""
    decode_ms: float
    total_ms: float
    num_free: int
    """Drafts ready when the verifier's prefill ended; they cost no waiting."""
    gap_drafted: int
    gap_accepted: int
    cycle_drafted: tuple[int, ...]
    """Drafts checked in each verifier call of decode."""
    cycle_accepted: tuple[int, ...]
    first_difference: int | None
    """First answer position that differs from plain decoding; None: the outputs are equal."""
    near_tie: bool = False
    """The difference sits where rounding may decide (reduced precision only), so it is excused."""
    timeline: tuple[Span, ...] = field(default=())
    parts: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds of ``total_ms`` by part (``decoding.decoded.PARTS``); empty: of a batch."""
    batch: str = ""
    """Key of the first sample of the batch it was decoded in; then all times are the whole
    batch's, and each of its samples has them. Empty: it was decoded alone."""
    batch_size: int = 1
    alone_ms: float | None = None
    """Plain decoding of this sample alone, measured beside its batch."""
    beside: Mapping[str, float] = field(default_factory=dict)
    """Plain decoding of the same sample (or batch) right before and right after, on average:
    ``prefill_ms``, ``decode_ms`` and ``total_ms``. Empty: only the baseline's own trace tells."""
    modelled_ms: float | None = None
    """What costs that were measured before the benchmark, and this trace's counts, give for the
    whole answer: no reading of its clock. None: the costs are not known."""

    @property
    def lossless(self) -> bool:
        return self.first_difference is None or self.near_tie

"""How the tiny pair is made. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainConfig:
    """Data and schedule of the tiny pair's pretraining."""

    num_scenes: int = 6000
    """Synthetic training clips."""
    num_held_out: int = 300
    """Clips of unseen recordings that the card's figures are measured on."""
    clips_per_recording: int = 12
    """Clips that share time of day, roadside and appearance."""
    size: int = 96
    """Side of the rendered frames, in pixels."""
    facts_epochs: int = 10
    """Epochs of teaching the visual tokens the scene's facts."""
    gathering_epochs: int = 4
    """Epochs of teaching the language model's lower layers to gather the facts."""
    language_minutes: float = 25.0
    """Language training of the verifier's first layers; the drafter gets a quarter of the time."""
    grown_share: float = 0.4
    """Time with all layers, as a share of the time before."""
    questions_per_scene: int = 5
    """Questions drawn for a clip each time it is seen."""
    batch_scenes: int = 6
    """Clips in one optimizer step of language training."""
    learning_rate: float = 2e-3
    """Peak of AdamW; the matrices inside the layers are trained by Muon."""
    muon_learning_rate: float = 2e-2
    seed: int = 0
    num_workers: int = 2
    """Processes that render scenes."""

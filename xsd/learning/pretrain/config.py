"""How the tiny pair is made. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PretrainConfig:
    """Data and schedule of the tiny pair's pretraining.

    The defaults suit two CPU cores; ``experiments/pretrain.yaml`` made the shipped weights.
    """

    num_scenes: int = 3000
    """Synthetic training clips."""
    num_held_out: int = 120
    """Clips of unseen recordings that the card's figures are measured on."""
    clips_per_recording: int = 12
    """Clips that share time of day, roadside and appearance."""
    frame_size: int = 96
    """Side of the rendered frames, in pixels."""
    size: Literal["tiny", "lab"] = "tiny"
    """Of the models: tiny for CPUs, or lab, 240 M parameters for a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: products of the training passes are made in it; weights stay in fp32."""
    facts_epochs: int = 10
    """Epochs of teaching the visual tokens the scene's facts."""
    facts_batch: int = 32
    """Clips in one optimizer step of the facts."""
    facts_learning_rate: float = 1.5e-3
    """Peak of AdamW while the facts are taught."""
    gathering_epochs: int = 4
    """Epochs of teaching the language model's lower layers to gather the facts."""
    gathering_batch: int = 24
    """Clips in one optimizer step of the gathering."""
    language_steps: int = 1500
    """Language training of the verifier's first layers, in optimizer steps."""
    grown_steps: int = 500
    """Optimizer steps with all of its layers."""
    grown_rate: float = 0.5
    """Peak learning rates with all layers, as a share of those before."""
    drafter_steps: int = 1200
    """Language training of the drafter, whose few layers learn at once."""
    questions_per_scene: int = 5
    """Questions drawn for a clip each time it is seen."""
    batch_scenes: int = 6
    """Clips in one optimizer step of the verifier's language training."""
    drafter_batch_scenes: int = 16
    """Clips in one optimizer step of the drafter's."""
    learning_rate: float = 2e-3
    """Peak of AdamW; the matrices inside the layers are trained by Muon."""
    muon_learning_rate: float = 1.5e-2
    """Peak of Muon."""
    device: str = "auto"
    """``cpu``, ``cuda`` or ``auto``."""
    seed: int = 0
    num_workers: int = 2
    """Processes that render scenes and word answers."""

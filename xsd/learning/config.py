"""How an adapter is fitted. Free of torch, so that ``--help`` stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xsd.errors import XsdError

LossKind = Literal["feature", "token"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    num_epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    eta_min: float = 1e-6
    """Learning rate that the cosine ends on."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    max_norm: float = 1.0
    """Gradients are clipped to this norm."""
    early_stopping: int = 10
    """Epochs without a better accept length before training stops; 0 never stops early."""
    loss: LossKind | None = "token"
    """'token': KL to the verifier's distribution; 'feature': the seed's; null: the level's own."""
    unroll_steps: int = 4
    """Steps that heads train on their own outputs (token loss, and E1-E3)."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """bf16: products in half precision, weights and sums in float32; null: that on a GPU, no on a
    CPU."""
    compile: bool = False
    """Fuse the row-wise parts of attentive levels by torch.compile: for a GPU. On a CPU our own
    products are faster than what it makes (docs/training.md)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "unroll_steps"):
            if getattr(self, name) < 1:
                raise XsdError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("weight_decay", "eta_min", "warmup_steps", "early_stopping", "seed"):
            if getattr(self, name) < 0:
                raise XsdError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("learning_rate", "max_norm"):
            if not getattr(self, name) > 0:
                raise XsdError(f"{name}={getattr(self, name)}: must be above 0")

"""What an adapter is built from. Free of torch, so that ``--help`` stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xsd.errors import XsdError

AttentionKind = Literal["causal", "bidirectional"]


@dataclass(frozen=True, kw_only=True)
class AdapterSizes:
    """The sizes a user may choose; None takes the level's own (``catalog.Level.sizes``)."""

    bottleneck_dim: int | None = None
    """Width inside L1-L3."""
    num_blocks: int | None = None
    """Residual blocks of L1-L3."""
    num_heads: int = 8
    num_layers: int = 1
    """Transformer blocks of L4, L5, L5F, B1, X1, E1-E3, text."""
    ffn_dim: int = 2048
    dropout: float = 0.1
    attention: AttentionKind = "causal"
    """'bidirectional' sees future drafter states: L4 only, offline only, never promoted."""
    max_positions: int = 512
    """Longest answer that heads with learned positions can follow."""

    def __post_init__(self) -> None:
        for name in ("bottleneck_dim", "num_blocks", "num_heads", "num_layers", "ffn_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise XsdError(f"{name}={value}: must be at least 1")
        if self.max_positions < 1:
            raise XsdError(f"max_positions={self.max_positions}: must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise XsdError(f"dropout={self.dropout}: must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(AdapterSizes):
    """Everything ``catalog.build`` needs; saved with every checkpoint."""

    level: str
    d_drafter: int
    d_verifier: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_drafter < 1 or self.d_verifier < 1:
            raise XsdError(f"widths {self.d_drafter} and {self.d_verifier}: must be at least 1")

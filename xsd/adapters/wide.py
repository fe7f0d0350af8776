"""L3: wide residual bottlenecks, normalised inside, a position at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xsd.adapters.base import Adapter, Positions, StepInputs
from xsd.adapters.bottleneck import zero_linear
from xsd.adapters.config import AdapterConfig


class WideBlock(nn.Module):
    """``x + alpha * up(gelu(LN(down x)))``; starts as the identity."""

    def __init__(self, width: int, bottleneck_dim: int, dropout: float) -> None:
        super().__init__()
        self.transform = nn.Sequential(
            nn.Linear(width, bottleneck_dim, bias=False),
            nn.LayerNorm(bottleneck_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            zero_linear(bottleneck_dim, width),
            nn.Dropout(dropout),
        )
        self.alpha = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
        return torch.addcmul(x, self.alpha, self.transform(x))


class WideBottleneck(Adapter):
    """A LayerNorm, n wide blocks, a LayerNorm."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        assert config.num_blocks and config.bottleneck_dim, "sizes were not resolved"
        width = config.d_verifier
        blocks = (
            WideBlock(width, config.bottleneck_dim, config.dropout)
            for _ in range(config.num_blocks)
        )
        self.layers = nn.Sequential(nn.LayerNorm(width), *blocks, nn.LayerNorm(width))

    def embed(
        self, rows: StepInputs, at: Positions
    ) -> tuple[Float[Tensor, "B R Dv"], Float[Tensor, "B R Dv"]]:
        h = self.enter(rows.drafter)
        return self.layers(h), h

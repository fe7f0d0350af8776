"""L1 and L2: residual bottlenecks, a position at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xsd.adapters.base import Adapter, Positions, StepInputs
from xsd.adapters.config import AdapterConfig


class BottleneckBlock(nn.Module):
    """``x + alpha * up(gelu(down(LN x)))``; starts as the identity."""

    def __init__(self, width: int, bottleneck_dim: int, dropout: float) -> None:
        super().__init__()
        self.transform = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, bottleneck_dim, bias=False),
            nn.GELU(),
            nn.Dropout(dropout),
            zero_linear(bottleneck_dim, width),
        )
        self.alpha = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
        return torch.addcmul(x, self.alpha, self.transform(x))


class Bottleneck(Adapter):
    """L1: one block and a LayerNorm. L2: three blocks and a LayerNorm."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        assert config.num_blocks and config.bottleneck_dim, "sizes were not resolved"
        width = config.d_verifier
        blocks = (
            BottleneckBlock(width, config.bottleneck_dim, config.dropout)
            for _ in range(config.num_blocks)
        )
        self.layers = nn.Sequential(*blocks, nn.LayerNorm(width))

    def embed(
        self, rows: StepInputs, at: Positions
    ) -> tuple[Float[Tensor, "B R Dv"], Float[Tensor, "B R Dv"]]:
        h = self.enter(rows.drafter)
        return self.layers(h), h


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free linear layer that starts at zero."""
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.zeros_(layer.weight)
    return layer

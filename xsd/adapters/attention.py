"""L4: a transformer block over the drafter's states, mixed into them."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xsd.adapters.base import Adapter
from xsd.adapters.block import Block
from xsd.adapters.compiled import CompiledHead
from xsd.adapters.config import AdapterConfig
from xsd.adapters.entry import DrafterEntry
from xsd.adapters.rows import Positions, StepInputs


class AttentionAdapter(Adapter):
    """``h + alpha * (o - h)``, where ``o`` is the block's output after LayerNorm and Linear."""

    activation: ClassVar[type[nn.Module]] = nn.GELU

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        width = config.d_verifier
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            Block(
                width,
                config.num_heads,
                config.ffn_dim,
                config.dropout,
                activation=self.activation(),
                cross=self.memory is not None,
            )
            for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.project = identity_linear(width)
        self.alpha = nn.Parameter(torch.tensor(0.1))

    def embed(
        self, rows: StepInputs, at: Positions
    ) -> tuple[Float[Tensor, "B R Dv"], Float[Tensor, "B R Dv"]]:
        h = self.enter(rows.drafter)
        return h, h

    def finish(
        self, x: Float[Tensor, "B R Dv"], residual: Float[Tensor, "B R Dv"]
    ) -> Float[Tensor, "B R Dv"]:
        return torch.lerp(residual, self.project(self.norm_out(x)).to(residual.dtype), self.alpha)

    def compiled(self) -> CompiledHead | None:
        nowhere = self.alpha.new_zeros(self.config.max_positions, self.config.d_verifier)
        entry = DrafterEntry.of(self.enter, is_raw=True)
        return CompiledHead(self, nowhere, None, float(self.alpha.detach()), entry)


def identity_linear(width: int) -> nn.Linear:
    """A square linear layer that starts as the identity."""
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

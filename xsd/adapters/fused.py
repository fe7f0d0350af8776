"""L5F: the L5 core on a gated fusion of drafter and verifier states."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xsd.adapters.compiled import CompiledHead
from xsd.adapters.config import AdapterConfig
from xsd.adapters.eagle import EagleAdapter
from xsd.adapters.entry import DrafterEntry
from xsd.adapters.rows import Positions, StepInputs


class FusedEagleAdapter(EagleAdapter):
    """``g = sigmoid(W[e;v])``; ``x = LN(g*e + (1-g)*v + P[e;v])``; ``v + alpha * (o - v)``."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        width = config.d_verifier
        self.gate = nn.Linear(2 * width, width)
        self.mix = nn.Linear(2 * width, width)

    def embed(
        self, rows: StepInputs, at: Positions
    ) -> tuple[Float[Tensor, "B R Dv"], Float[Tensor, "B R Dv"]]:
        v = rows.verifier
        assert v is not None, "L5F reads verifier states"
        # In mixed precision a layer's output comes halved.
        e = self.enter(rows.drafter).to(v.dtype)
        both = torch.cat((e, v), dim=-1)
        fused = torch.lerp(v, e, torch.sigmoid(self.gate(both)).to(v.dtype)) + self.mix(both)
        return self.norm_in(fused) + self.positions[at], v

    def compiled(self) -> CompiledHead | None:
        entry = DrafterEntry.of(self.enter).fused(self.gate, self.mix, self.norm_in.weight)
        positions = self.positions + self.norm_in.bias
        return CompiledHead(self, positions, None, float(self.alpha.detach()), entry)

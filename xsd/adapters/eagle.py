"""Heads that predict the verifier's next state: L5, B1, E1, E2 and text.

L5 and B1 follow EAGLE's feature regression (arXiv:2401.15077) without its token input, as the seed
did; E1 is EAGLE with it, trained on its own outputs as in EAGLE-3 (arXiv:2503.01840).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from xsd.adapters.attention import AttentionAdapter
from xsd.adapters.compiled import CompiledHead, Entrance
from xsd.adapters.config import AdapterConfig
from xsd.adapters.entry import DrafterEntry
from xsd.adapters.rows import Positions, StepInputs


class EagleAdapter(AttentionAdapter):
    """L5: LayerNorm and learned positions before the L4 core; reads the drafter."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.norm_in = nn.LayerNorm(config.d_verifier)
        self.positions = learned_positions(config)

    def embed(
        self, rows: StepInputs, at: Positions
    ) -> tuple[Float[Tensor, "B R Dv"], Float[Tensor, "B R Dv"]]:
        h = self.source(rows)
        return self.norm_in(h) + self.positions[at], h

    def source(self, rows: StepInputs) -> Float[Tensor, "B R Dv"]:
        states: Tensor = self.enter(rows.drafter)
        return states

    def compiled(self) -> CompiledHead | None:
        return self._compiled(DrafterEntry.of(self.enter))

    def _compiled(self, entry: DrafterEntry | None) -> CompiledHead:
        entrance = Entrance(torch.eye(self.config.d_verifier), self.norm_in)
        return CompiledHead(self, self.positions, entrance, float(self.alpha.detach()), entry)


class VerifierEagleAdapter(EagleAdapter):
    """B1: L5 on the verifier's own states."""

    def source(self, rows: StepInputs) -> Float[Tensor, "B R Dv"]:
        assert rows.verifier is not None, "B1 reads verifier states"
        return rows.verifier

    def compiled(self) -> CompiledHead | None:
        return self._compiled(None)


class TokenHead(AttentionAdapter):
    """E1: the block runs over a fusion of verifier state and embedding of the chosen token.

    Both are normalised first, for states and embeddings differ in scale by a factor of fifty. The
    output is free of the input state, which says little about the next one. SiLU: a CPU takes
    several times as long for GELU.
    """

    activation = nn.SiLU

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        del self.alpha
        width = config.d_verifier
        self.norm_state = nn.LayerNorm(width)
        self.norm_token = nn.LayerNorm(width)
        self.fuse = nn.Linear(2 * width, width)
        self.positions = learned_positions(config)

    def embed(
        self, rows: StepInputs, at: Positions
    ) -> tuple[Float[Tensor, "B R Dv"], Float[Tensor, "B R Dv"]]:
        assert rows.token is not None, "a token head reads tokens"
        states: Tensor = self.norm_state(rows.verifier)
        width = states.shape[-1]
        x = linear(states, self.fuse.weight[:, :width]) + (rows.token + self.positions[at])
        return x, x

    def read_tokens(self, token: Float[Tensor, "*rows Dv"]) -> Float[Tensor, "*rows Dv"]:
        """The token's half of ``fuse``."""
        width = token.shape[-1]
        return linear(self.norm_token(token), self.fuse.weight[:, width:], self.fuse.bias)

    def finish(
        self, x: Float[Tensor, "B R Dv"], residual: Float[Tensor, "B R Dv"]
    ) -> Float[Tensor, "B R Dv"]:
        out: Tensor = self.project(self.norm_out(x))
        return out

    def compiled(self) -> CompiledHead | None:
        return self._compiled(None)

    def _compiled(self, entry: DrafterEntry | None) -> CompiledHead:
        # The bias of ``fuse`` comes with the token.
        entrance = Entrance(self.fuse.weight[:, : self.config.d_verifier], self.norm_state)
        return CompiledHead(self, self.positions, entrance, entry=entry)


class DrafterTokenHead(TokenHead):
    """E2: E1 that attends to the drafter's states, which have read the chosen token too."""

    memory = "drafter"

    def compiled(self) -> CompiledHead | None:
        crosses = [block.cross for block in self.blocks if block.cross is not None]
        entry = DrafterEntry.of(self.enter)
        return self._compiled(entry.remembered([(c.key_value, c.norm_memory) for c in crosses]))


class TextHead(TokenHead):
    """text: E1 without the verifier's state, a control for what language alone predicts.

    A chain is unrolled by its tokens, which the parallel pass reads too: it has no states of its
    own to be fed, so one pass trains every depth.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        del self.norm_state, self.fuse

    def embed(
        self, rows: StepInputs, at: Positions
    ) -> tuple[Float[Tensor, "B R Dv"], Float[Tensor, "B R Dv"]]:
        assert rows.token is not None, "a token head reads tokens"
        x = rows.token + self.positions[at]
        return x, x

    def read_tokens(self, token: Float[Tensor, "*rows Dv"]) -> Float[Tensor, "*rows Dv"]:
        read: Tensor = self.norm_token(token)
        return read

    def compiled(self) -> CompiledHead | None:
        return CompiledHead(self, self.positions, None)


def learned_positions(config: AdapterConfig) -> nn.Parameter:
    """[max_positions, Dv]; position 0 is the answer's first."""
    return nn.Parameter(0.02 * torch.randn(config.max_positions, config.d_verifier))

"""Linears in NF4 as captured passes read them: bitsandbytes' own bytes, several in one.

bitsandbytes rounds blocks of 64 weights to 16 values of a normal distribution (QLoRA,
arXiv:2305.14314), and the blocks' scales, 256 at a time, to 8 bits. Its kernels are quick for one
row; here a few rows read the weight once, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK = 64
"""Weights that share a scale."""
SCALES = 256
"""Scales that share a scale."""


@dataclass(frozen=True)
class FourBitWeight:
    """Rounded weights of linears without bias, stacked: ``out`` rows of ``in`` inputs."""

    packed: UInt8[Tensor, "out half"]
    """Two weights a byte, the first in the upper half."""
    scales: UInt8[Tensor, "out blocks"]
    """Of every block: which of ``scale_values``."""
    values: Float[Tensor, " 16"]
    """What a weight may be, before it is scaled."""
    scale_values: Float[Tensor, " 256"]
    outer: Float[Tensor, "2 groups"]
    """Of every 256 scales: by what they are multiplied, and what is added then."""

    @property
    def num_outs(self) -> int:
        return int(self.packed.shape[0])

    @property
    def num_ins(self) -> int:
        return 2 * int(self.packed.shape[1])

    @classmethod
    def of(cls, modules: Sequence[Any]) -> FourBitWeight | None:
        """Stack linears of bitsandbytes, and make the modules views of it (no second copy).

        None: they are others, or their blocks do not come in whole rows and groups.
        """
        if not all(_fits(module) for module in modules):
            return None
        states = [module.weight.quant_state for module in modules]
        first = states[0]
        same = all(
            torch.equal(state.state2.code, first.state2.code)
            and torch.equal(state.code, first.code)
            and state.shape[1] == first.shape[1]
            for state in states
        )
        if not same:
            return None
        packed = torch.cat([module.weight.data.view(-1, first.shape[1] // 2) for module in modules])
        scales = torch.cat([state.absmax.view(-1, first.shape[1] // BLOCK) for state in states])
        outer = [
            torch.stack([state.state2.absmax, torch.full_like(state.state2.absmax, state.offset)])
            for state in states
        ]
        counts = [int(state.shape[0]) for state in states]
        for module, data, scale in zip(
            modules, packed.split(counts), scales.split(counts), strict=True
        ):
            module.weight.data = data.view(-1, 1)
            module.weight.quant_state.absmax = scale.view(-1)
        return cls(
            packed,
            scales,
            first.code.float(),
            first.state2.code.float(),
            torch.cat(outer, dim=1).float().contiguous(),
        )

    def restore(self) -> Float[Tensor, "out in"]:
        """The weights in single precision."""
        codes = torch.stack([self.packed >> 4, self.packed & 15], dim=-1).flatten(1)
        groups = torch.arange(self.scales.numel(), device=self.packed.device) // SCALES
        inner = self.scale_values[self.scales.flatten().int()]
        scales = inner * self.outer[0, groups] + self.outer[1, groups]
        blocks = self.values[codes.int()].view(*self.scales.shape, BLOCK)
        return (blocks * scales.view(self.scales.shape)[..., None]).flatten(1)


def _fits(module: Any) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None or module.bias is not None or not getattr(state, "nested", False):
        return False
    num_outs, num_ins = state.shape
    is_nf4 = state.quant_type == "nf4" and state.blocksize == BLOCK
    is_whole = num_ins % BLOCK == 0 and num_outs * num_ins % (BLOCK * SCALES) == 0
    return bool(is_nf4 and state.state2.blocksize == SCALES and is_whole)

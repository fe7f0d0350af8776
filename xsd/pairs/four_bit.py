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


@dataclass(frozen=True)
class FourBitWeight:
    """Rounded weights of linears without bias, stacked: ``out`` rows of ``in`` inputs."""

    packed: UInt8[Tensor, "out half"]
    """Two weights a byte, the first in the upper half."""
    scales: Float[Tensor, "blocks out"]
    """Of every block, restored; in half precision, as they are read with the weights."""
    values: Float[Tensor, " 16"]
    """What a weight may be, before it is scaled."""

    @property
    def num_outs(self) -> int:
        return int(self.packed.shape[0])

    @property
    def num_ins(self) -> int:
        return 2 * int(self.packed.shape[1])

    @classmethod
    def of(cls, modules: Sequence[Any]) -> FourBitWeight | None:
        """Stack linears of bitsandbytes, and make the modules views of it (no second copy).

        None: they are others, or their blocks do not come in whole rows.
        """
        if not all(_fits(module) for module in modules):
            return None
        states = [module.weight.quant_state for module in modules]
        (num_ins, *others) = {int(state.shape[1]) for state in states}
        if others:
            return None
        counts = [int(state.shape[0]) for state in states]
        packed = torch.cat([module.weight.data.view(-1, num_ins // 2) for module in modules])
        for module, data in zip(modules, packed.split(counts), strict=True):
            module.weight.data = data.view(-1, 1)
        scales = torch.cat([_scales(state).view(-1, num_ins // BLOCK) for state in states])
        return cls(packed, scales.half().t().contiguous(), states[0].code.float())

    def restore(self) -> Float[Tensor, "out in"]:
        """The weights in single precision."""
        codes = torch.stack([self.packed >> 4, self.packed & 15], dim=-1).flatten(1)
        blocks = self.values[codes.int()].unflatten(1, (-1, BLOCK))
        restored: Tensor = (blocks * self.scales.t().float()[..., None]).flatten(1)
        return restored


def _scales(state: Any) -> Float[Tensor, " blocks"]:
    """Of the blocks, from the 8 bits in which bitsandbytes keeps them, 256 at a time."""
    inner, outer = state.state2.code[state.absmax.int()], state.state2
    repeated: Tensor = outer.absmax.repeat_interleave(outer.blocksize)[: len(inner)]
    scales: Tensor = inner * repeated + state.offset
    return scales


def _fits(module: Any) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None or module.bias is not None or not getattr(state, "nested", False):
        return False
    is_nf4 = state.quant_type == "nf4" and state.blocksize == BLOCK
    return bool(is_nf4 and state.shape[1] % BLOCK == 0)

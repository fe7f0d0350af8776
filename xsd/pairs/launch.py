"""How the kernels of captured passes are launched: pure arithmetic on sizes.

The numbers are those that were fastest on an H200; chips with less shared memory get less of
everything at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

_MAX_TILE = 64
_MAX_SPLITS = 32
_HALF_BYTES = 2


@dataclass(frozen=True)
class Chip:
    """What a launch must know of a GPU."""

    num_processors: int
    shared_bytes: int
    """Shared memory that a program may have."""

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        found = torch.cuda.get_device_properties(device)
        optin = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
        return cls(found.multi_processor_count, optin)


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads


class AttentionPlan(NamedTuple):
    """A launch of attention."""

    tile: int
    """Rows and heads of a group that a program takes together."""
    columns: int
    """Positions it looks at together."""
    num_splits: int
    """Programs that share a head's positions."""
    num_warps: int
    num_stages: int


class ProjectionPlan(NamedTuple):
    """A launch of a product of some rows with a weight."""

    rows: int
    """Rows it has room for."""
    outs: int
    """Outputs a program computes."""
    step: int
    """Inputs it reads at a time."""
    num_warps: int
    num_stages: int


class FourBitPlan(NamedTuple):
    """A launch of a product of some rows with an NF4 weight."""

    rows: int
    outs: int
    blocks: int
    """Blocks of 64 inputs that are on their way together."""
    by_bits: bool
    """Look values up in registers; else in memory."""
    num_warps: int
    num_stages: int


def plan_attention(num_rows: int, shape: HeadShape, chip: Chip, is_exact: bool) -> AttentionPlan:
    """About one program a multiprocessor.

    Args:
        is_exact: numbers are in single precision.
    """
    lanes = num_rows * shape.group
    tile = min(_MAX_TILE, max(16, power_from(lanes)))
    programs = shape.num_kv_heads * -(-lanes // tile)
    num_splits = 1 << max(0, (chip.num_processors // programs).bit_length() - 1)
    num_splits = min(_MAX_SPLITS, num_splits)
    if is_exact:
        return AttentionPlan(tile, 32, num_splits, 4, 2)
    width = max(16, power_from(shape.head_dim))
    a_stage = 2 * 128 * width * _HALF_BYTES
    if 3 * a_stage + tile * width * _HALF_BYTES <= chip.shared_bytes:
        return AttentionPlan(tile, 128, num_splits, 8, 3)
    return AttentionPlan(tile, 32, num_splits, 4, 2)


def plan_projection(num_rows: int, num_outs: int, chip: Chip, gated: bool) -> ProjectionPlan:
    """At least one program for every second multiprocessor, and as much of the weight on its way
    as shared memory holds.

    Args:
        gated: the weight is two of ``num_outs`` outputs.
    """
    rows = max(16, power_from(num_rows))
    outs = min(128, max(16, power_from(2 * num_outs // chip.num_processors)))
    num_warps = 8 if outs == 128 else 4
    step, num_stages = 128, 4 if outs == 128 else 6
    if gated:
        step, num_stages = (64, 4) if rows > 32 else (128, 3)

    def a_stage() -> int:
        return (outs * (2 if gated else 1) + rows) * step * _HALF_BYTES

    while num_stages > 2 and num_stages * a_stage() > chip.shared_bytes:
        num_stages -= 1
    while step > 16 and num_stages * a_stage() > chip.shared_bytes:
        step //= 2
    return ProjectionPlan(rows, outs, step, num_warps, num_stages)


def plan_four_bit(num_rows: int, num_outs: int, chip: Chip, gated: bool) -> FourBitPlan:
    """As ``plan_projection``; a block of 64 weights takes 32 bytes."""
    rows = max(16, power_from(num_rows))
    outs = min(64, max(16, power_from(num_outs // chip.num_processors)))
    if rows > 16:
        outs = outs if outs == 64 else 16
    blocks = {64: 1, 32: 2, 16: 4}[outs]
    return FourBitPlan(rows, outs, blocks, True, 4, 3 if outs > 16 else 4)


def power_from(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()

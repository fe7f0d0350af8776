"""A few rows times an NF4 weight, as a Triton kernel: the weight is read once, packed as it is.

A byte holds two neighbouring inputs, so a block of 64 is two products, one with the rows' even
inputs and one with their odd ones; the block's scale then multiplies their sum, in single
precision. So no weight is ever scaled, and the rows are all that is taken apart.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from xsd.pairs.four_bit import FourBitWeight
from xsd.pairs.gpu_kernels import EARLY
from xsd.pairs.launch import Chip, FourBitPlan, plan_four_bit
from xsd.pairs.look_up import nf4_look_up

_LOOK_UP = tl.constexpr(nf4_look_up())


def project_four_bit(
    x: Float[Tensor, "R in"],
    weight: FourBitWeight,
    chip: Chip,
    *,
    norm: Float[Tensor, " in"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    onto: Float[Tensor, "R out"] | None = None,
    plan: FourBitPlan | None = None,
) -> Float[Tensor, "R _"]:
    """``gpu_kernels.project`` of a rounded weight.

    Args:
        plan: None: ``launch.plan_four_bit``'s.
    """
    num_rows, num_ins = x.shape
    num_outs = weight.num_outs // (2 if gated else 1)
    out = x.new_empty(num_rows, num_outs) if onto is None else onto
    plan = plan or plan_four_bit(num_rows, num_outs, chip, gated)
    _project_four_bit[(triton.cdiv(num_outs, plan.outs),)](
        x,
        x if norm is None else norm,
        weight.packed,
        weight.scales,
        weight.values,
        out,
        num_rows,
        num_outs,
        num_ins,
        eps,
        NORMED=norm is not None,
        GATED=gated,
        ADDED=onto is not None,
        ROWS=plan.rows,
        OUTS=plan.outs,
        BLOCKS=plan.blocks if num_ins % (64 * plan.blocks) == 0 else 1,
        BY_BITS=plan.by_bits and x.dtype == torch.bfloat16,
        EARLY=EARLY,
        launch_pdl=EARLY,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out


@triton.jit
@no_type_check
def _unpack(packed, values, dtype: tl.constexpr, BY_BITS: tl.constexpr):
    """The first and the second weight of every byte."""
    if BY_BITS:
        # Four bytes at a time: a permutation of bytes looks up four weights' upper or lower
        # bytes in half of the table, and a fourth bit chooses between its halves.
        return tl.inline_asm_elementwise(
            _LOOK_UP,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    code = packed.to(tl.int32)
    first = tl.load(values + (code >> 4))
    second = tl.load(values + (code & 15))
    return first.to(dtype), second.to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
@no_type_check
def _project_four_bit(
    x,
    norm,
    packed,
    scales,
    values,
    out,
    num_rows,
    num_outs,
    num_ins,
    eps,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BY_BITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    output = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    # Outputs beyond the last read the last one's weights, and are not kept.
    source = tl.minimum(output, num_outs - 1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    byte = tl.arange(0, 32)
    summed = tl.zeros([OUTS, ROWS], tl.float32)
    second = tl.zeros([OUTS, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    twice: tl.constexpr = 2 if GATED else 1
    # Scales are read a round ahead: nothing here would hide how long that takes.
    block = tl.arange(0, BLOCKS)
    num_blocks = num_ins // 64
    at_scale = block[None, :] * num_outs * twice + source[:, None]
    scale = tl.load(scales + at_scale)
    other = tl.load(scales + at_scale + num_outs) if GATED else scale
    for begin in range(0, num_ins, 64 * BLOCKS):
        ahead = tl.minimum(begin // 64 + BLOCKS, num_blocks - BLOCKS) * num_outs * twice
        scale_ahead = tl.load(scales + ahead + at_scale)
        other_ahead = tl.load(scales + ahead + at_scale + num_outs) if GATED else scale_ahead
        for number in tl.static_range(BLOCKS):
            start = begin + 64 * number
            at = start + tl.arange(0, 64)
            given = tl.load(
                x + row[:, None] * num_ins + at[None, :], mask=is_row[:, None], other=0.0
            )
            if NORMED:
                exact = given.to(tl.float32)
                squares += tl.sum(exact * exact, 1)
                given = (exact * tl.load(norm + at).to(tl.float32)[None, :]).to(given.dtype)
            even, odd = tl.split(tl.reshape(given, [ROWS, 32, 2]))
            even = tl.trans(even)
            odd = tl.trans(odd)
            cell = source[:, None] * (num_ins // 2) + start // 2 + byte[None, :]
            product = _block(packed + cell, even, odd, values, BY_BITS)
            summed += product * _column(scale, number, BLOCKS)
            if GATED:
                cell += num_outs * (num_ins // 2)
                product = _block(packed + cell, even, odd, values, BY_BITS)
                second += product * _column(other, number, BLOCKS)
        scale = scale_ahead
        other = other_ahead
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if NORMED:
        size = tl.rsqrt(squares / num_ins + eps)
        summed *= size[None, :]
        second *= size[None, :]
    if GATED:
        summed = summed * tl.sigmoid(summed) * second
    target = out + row[None, :] * num_outs + output[:, None]
    is_kept = is_row[None, :] & (output < num_outs)[:, None]
    if ADDED:
        summed += tl.load(target, mask=is_kept, other=0.0).to(tl.float32)
    tl.store(target, summed.to(out.dtype.element_ty), mask=is_kept)


@triton.jit
@no_type_check
def _block(cells, even, odd, values, BY_BITS: tl.constexpr):
    """A block of every output times its inputs of every row, not yet scaled: [OUTS, ROWS]."""
    first, second = _unpack(
        tl.load(cells, eviction_policy="evict_first"), values, even.dtype, BY_BITS
    )
    return tl.dot(second, odd, tl.dot(first, even))


@triton.jit
@no_type_check
def _column(scales, number: tl.constexpr, BLOCKS: tl.constexpr):
    """One of the columns, beside products: [OUTS, 1]."""
    if BLOCKS == 1:
        return scales.to(tl.float32)
    chosen = tl.arange(0, BLOCKS)[None, :] == number
    return tl.sum(tl.where(chosen, scales.to(tl.float32), 0.0), 1)[:, None]

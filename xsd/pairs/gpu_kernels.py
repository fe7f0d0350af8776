"""What stands between the matrix products of a decoder layer, as Triton kernels.

A captured pass runs at lengths that change from replay to replay, so these read the length of the
cache from the device. Attention splits the cache's positions over the multiprocessors (as
Flash-Decoding does): a few rows alone would keep a few dozen of them busy. Arithmetic is in single
precision, whatever is read and written.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from xsd.pairs.launch import Chip, HeadShape, plan_attention, plan_projection

EARLY = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
"""A kernel is launched when the one before it has read what it reads, and waits for its results
by itself: programmatic dependent launch, which chips have from compute capability 9 on."""


def rotate_and_append(
    qkv: Float[Tensor, "R qkv"],
    rotation: tuple[Float[Tensor, "positions head_dim"], Float[Tensor, "positions head_dim"]],
    position: Int[Tensor, " 1"],
    depths: Int[Tensor, " max_rows"],
    keys: Float[Tensor, "kv_heads length head_dim"],
    values: Float[Tensor, "kv_heads length head_dim"],
    shape: HeadShape,
) -> Float[Tensor, "R heads head_dim"]:
    """Rotate queries and keys, write keys and values behind ``position``; return the queries.

    Args:
        rotation: cosine and sine, the sign of "rotate half" in the sine.
        depths: where the rows stand, counted from ``position``.
    """
    num_rows = qkv.shape[0]
    queries = qkv.new_empty(num_rows, shape.num_heads, shape.head_dim)
    grid = (num_rows, shape.num_heads + 2 * shape.num_kv_heads)
    _rotate_and_append[grid](
        qkv,
        *rotation,
        position,
        depths,
        queries,
        keys,
        values,
        keys.stride(0),
        values.stride(0),
        NUM_HEADS=shape.num_heads,
        NUM_KV_HEADS=shape.num_kv_heads,
        HEAD_DIM=shape.head_dim,
        WIDTH=triton.next_power_of_2(shape.head_dim),
        EARLY=EARLY,
        launch_pdl=EARLY,
        num_warps=1,
    )
    return queries


def attend(
    queries: Float[Tensor, "R heads head_dim"],
    keys: Float[Tensor, "kv_heads length head_dim"],
    values: Float[Tensor, "kv_heads length head_dim"],
    position: Int[Tensor, " 1"],
    ancestors: UInt8[Tensor, "max_rows max_rows"],
    shape: HeadShape,
    chip: Chip,
    span: int = 0,
) -> Float[Tensor, "R width"]:
    """Attention of R rows to ``position`` cached ones and to those of themselves they follow.

    Args:
        span: split so many positions over programs, however few there are; then sums are made in
            the same order wherever the rows stand. 0: as many as there are.
    """
    num_rows = queries.shape[0]
    width = max(16, triton.next_power_of_2(shape.head_dim))
    is_exact = queries.dtype == torch.float32
    plan = plan_attention(num_rows, shape, chip, is_exact)
    num_splits = plan.num_splits
    num_tiles = triton.cdiv(num_rows * shape.group, plan.tile)
    sums = queries.new_empty(num_splits, num_rows, shape.num_heads, width, dtype=torch.float32)
    stats = queries.new_empty(2, num_splits, num_rows, shape.num_heads, dtype=torch.float32)
    _attend[(shape.num_kv_heads, num_tiles, num_splits)](
        queries,
        keys,
        values,
        position,
        ancestors,
        sums,
        stats,
        num_rows,
        span,
        keys.stride(0),
        values.stride(0),
        ancestors.stride(0),
        shape.head_dim**-0.5 * 1.4426950408889634,
        NUM_SPLITS=num_splits,
        NUM_HEADS=shape.num_heads,
        GROUP=shape.group,
        HEAD_DIM=shape.head_dim,
        WIDTH=width,
        TILE=plan.tile,
        COLUMNS=plan.columns,
        PRECISION="ieee" if is_exact else "tf32",
        EARLY=EARLY,
        launch_pdl=EARLY,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    attended = queries.new_empty(num_rows, shape.num_heads * shape.head_dim)
    _combine[(num_rows * shape.num_heads,)](
        sums,
        stats,
        attended,
        num_rows * shape.num_heads,
        NUM_SPLITS=num_splits,
        HEAD_DIM=shape.head_dim,
        WIDTH=width,
        EARLY=EARLY,
        launch_pdl=EARLY,
        num_warps=1,
    )
    return attended


def project(
    x: Float[Tensor, "R in"],
    weight: Float[Tensor, "out in"],
    chip: Chip,
    *,
    norm: Float[Tensor, " in"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    onto: Float[Tensor, "R out"] | None = None,
) -> Float[Tensor, "R _"]:
    """``x @ weight.T`` of a few rows: the weight is read once, at the rate of the memory.

    Args:
        norm: weight of an RMSNorm that ``x`` passes first, with ``eps``.
        gated: the weight is two, and the result ``silu`` of the first times the second.
        onto: the result is added to it, in place.
    """
    num_rows, num_ins = x.shape
    num_outs = weight.shape[0] // (2 if gated else 1)
    out = x.new_empty(num_rows, num_outs) if onto is None else onto
    plan = plan_projection(num_rows, num_outs, chip, gated)
    _project[(triton.cdiv(num_outs, plan.outs),)](
        x,
        x if norm is None else norm,
        weight,
        out,
        num_rows,
        num_outs,
        num_ins,
        eps,
        NORMED=norm is not None,
        GATED=gated,
        ADDED=onto is not None,
        EVEN=num_ins % plan.step == 0 and num_outs % plan.outs == 0,
        ROWS=plan.rows,
        OUTS=plan.outs,
        STEP=plan.step,
        EARLY=EARLY,
        launch_pdl=EARLY,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out


def silu_times(gate_up: Float[Tensor, "R twice"]) -> Float[Tensor, "R ffn"]:
    """``silu(gate) * up`` of the two halves of every row."""
    num_rows, twice = gate_up.shape
    out = gate_up.new_empty(num_rows, twice // 2)
    block = min(1024, triton.next_power_of_2(twice // 2))
    grid = (num_rows, triton.cdiv(twice // 2, block))
    _silu_times[grid](
        gate_up, out, twice // 2, BLOCK=block, EARLY=EARLY, launch_pdl=EARLY, num_warps=4
    )
    return out


def _kernel(function: Any) -> Any:
    """Counts are no reason to compile anew."""
    return triton.jit(function, do_not_specialize=["num_rows", "span"])


@_kernel
@no_type_check
def _rotate_and_append(
    qkv,
    cos,
    sin,
    position,
    depths,
    queries,
    keys,
    values,
    key_stride,
    value_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    head = tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    is_channel = channel < HEAD_DIM
    start = tl.load(position)
    source = qkv + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM
    x = tl.load(source + channel, mask=is_channel, other=0.0)
    if head < NUM_HEADS + NUM_KV_HEADS:
        half: tl.constexpr = HEAD_DIM // 2
        partner = tl.where(channel < half, channel + half, channel - half)
        angle = (start + tl.load(depths + row)) * HEAD_DIM + channel
        y = tl.load(source + partner, mask=is_channel, other=0.0).to(tl.float32)
        c = tl.load(cos + angle, mask=is_channel, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=is_channel, other=0.0).to(tl.float32)
        turned = (x.to(tl.float32) * c + y * s).to(x.dtype)
        if head < NUM_HEADS:
            target = queries + (row * NUM_HEADS + head) * HEAD_DIM
        else:
            target = keys + (head - NUM_HEADS) * key_stride + (start + row) * HEAD_DIM
        tl.store(target + channel, turned, mask=is_channel)
    else:
        target = values + (head - NUM_HEADS - NUM_KV_HEADS) * value_stride
        tl.store(target + (start + row) * HEAD_DIM + channel, x, mask=is_channel)


@_kernel
@no_type_check
def _attend(
    queries,
    keys,
    values,
    position,
    ancestors,
    sums,
    stats,
    num_rows,
    span,
    key_stride,
    value_stride,
    ancestor_stride,
    scale,
    NUM_SPLITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0)
    split = tl.program_id(2)
    start = tl.load(position)
    end = start + num_rows
    share = tl.cdiv(tl.cdiv(tl.maximum(end, span), NUM_SPLITS), COLUMNS) * COLUMNS
    first = split * share
    last = tl.minimum(first + share, end)
    lane = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row = lane // GROUP
    is_row = row < num_rows
    head = kv_head * GROUP + lane % GROUP
    channel = tl.arange(0, WIDTH)
    is_channel = channel < HEAD_DIM
    place = row * NUM_HEADS + head
    q = tl.load(
        queries + place[:, None] * HEAD_DIM + channel[None, :],
        mask=is_row[:, None] & is_channel[None, :],
        other=0.0,
    )
    largest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    summed = tl.zeros([TILE, WIDTH], tl.float32)
    for block in range(first, last, COLUMNS):
        column = block + tl.arange(0, COLUMNS)
        inside = column < last
        is_read = inside[:, None] & is_channel[None, :]
        cell = column[:, None] * HEAD_DIM + channel[None, :]
        k = tl.load(keys + kv_head * key_stride + cell, mask=is_read, other=0.0)
        v = tl.load(values + kv_head * value_stride + cell, mask=is_read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        new = column - start
        follows = tl.load(
            ancestors + row[:, None] * ancestor_stride + new[None, :],
            mask=is_row[:, None] & (inside & (new >= 0))[None, :],
            other=1,
        )
        scores = tl.where((follows != 0) & inside[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1))
        # A row that saw nothing yet: any finite value keeps its sums at zero.
        anchor = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(largest - anchor)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None]
        summed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = highest
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    rows = num_rows * NUM_HEADS
    tl.store(
        sums + (split * rows + place[:, None]) * WIDTH + channel[None, :],
        summed,
        mask=is_row[:, None],
    )
    tl.store(stats + split * rows + place, largest, mask=is_row)
    tl.store(stats + (NUM_SPLITS + split) * rows + place, total, mask=is_row)


@triton.jit
@no_type_check
def _combine(
    sums,
    stats,
    attended,
    rows,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    split = tl.arange(0, NUM_SPLITS)
    largest = tl.load(stats + split * rows + place)
    total = tl.load(stats + (NUM_SPLITS + split) * rows + place)
    weight = tl.exp2(largest - tl.max(largest, 0))
    parts = tl.load(sums + (split[:, None] * rows + place) * WIDTH + channel[None, :])
    x = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(
        attended + place * HEAD_DIM + channel,
        x.to(attended.dtype.element_ty),
        mask=channel < HEAD_DIM,
    )


@_kernel
@no_type_check
def _project(
    x,
    norm,
    weight,
    out,
    num_rows,
    num_outs,
    num_ins,
    eps,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    output = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    is_out = output < num_outs
    summed = tl.zeros([OUTS, ROWS], tl.float32)
    second = tl.zeros([OUTS, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    zero: tl.constexpr = None if EVEN else 0.0
    for begin in range(0, num_ins, STEP):
        at = begin + tl.arange(0, STEP)
        cell = output[:, None] * num_ins + at[None, :]
        is_read = None if EVEN else is_out[:, None] & (at < num_ins)[None, :]
        is_given = is_row[None, :] if EVEN else is_row[None, :] & (at < num_ins)[:, None]
        w = tl.load(weight + cell, mask=is_read, other=zero, eviction_policy="evict_first")
        given = tl.load(x + row[None, :] * num_ins + at[:, None], mask=is_given, other=0.0)
        if NORMED:
            exact = given.to(tl.float32)
            squares += tl.sum(exact * exact, 0)
            scale = tl.load(norm + at, mask=None if EVEN else at < num_ins)
            given = (exact * scale.to(tl.float32)[:, None]).to(given.dtype)
        summed = tl.dot(w, given, summed)
        if GATED:
            cell += num_outs * num_ins
            w = tl.load(weight + cell, mask=is_read, other=zero, eviction_policy="evict_first")
            second = tl.dot(w, given, second)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if NORMED:
        size = tl.rsqrt(squares / num_ins + eps)
        summed *= size[None, :]
        second *= size[None, :]
    if GATED:
        summed = summed * tl.sigmoid(summed) * second
    target = out + row[None, :] * num_outs + output[:, None]
    is_kept = is_row[None, :] & is_out[:, None]
    if ADDED:
        summed += tl.load(target, mask=is_kept, other=0.0).to(tl.float32)
    tl.store(target, summed.to(out.dtype.element_ty), mask=is_kept)


@triton.jit
@no_type_check
def _silu_times(gate_up, out, ffn, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    gate = tl.load(gate_up + row * 2 * ffn + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * ffn + column, mask=inside, other=0.0).to(tl.float32)
    x = gate * tl.sigmoid(gate) * up
    tl.store(out + row * ffn + column, x.to(out.dtype.element_ty), mask=inside)

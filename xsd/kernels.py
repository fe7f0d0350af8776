"""Compiled arithmetic for passes of a few rows on a CPU.

At a row or two a small model's step is mostly the library around it: a call of a few microseconds
for every operation, and matrix products made for hundreds of rows. Here a whole pass is one call.

A row's numbers do not depend on how many rows go through together: every sum runs in an order that
the row alone decides. So plain and speculative decoding agree to the last bit, and a branch of a
draft tree is a chain.

Numba compiles a kernel when it is first called and keeps the result on disk. All arrays are
C-contiguous float32 unless said.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

PANEL = 64
"""Columns of a weight that lie together in memory."""
_LANES = 16
"""Floats a vector; where a machine has shorter ones, LLVM splits them."""

# Fused multiply-adds everywhere; sums and maxima in any order only where a function says so.
_OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "nogil": True}
_EXACT = njit(fastmath={"contract"}, **_OPTIONS)
_REORDER = njit(fastmath={"contract", "reassoc", "nnan", "nsz"}, **_OPTIONS)

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_LOG2_E = np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)  # adding 1.5 * 2**23 leaves no room for a fraction
_LIMIT = np.float32(87.0)
# 2**f for |f| <= 1/2, to single precision.
_C1, _C2, _C3 = np.float32(0.6931471806), np.float32(0.2402265070), np.float32(0.0555041087)
_C4, _C5, _C6 = np.float32(0.0096181291), np.float32(0.0013333558), np.float32(0.0001540353)


# ---------------------------------------------------------------- products


def pack(weight: Float[np.ndarray, "*layers K N"]) -> Float[np.ndarray, "*layers panels K 64"]:
    """A weight in panels of 64 columns, the last one filled up with zeros."""
    *layers, size, width = weight.shape
    num_panels = -(-width // PANEL)
    padded = np.zeros((*layers, size, num_panels * PANEL), np.float32)
    padded[..., :width] = weight
    panels = padded.reshape(*layers, size, num_panels, PANEL)
    return np.ascontiguousarray(np.moveaxis(panels, -2, -3))


def _vectors_at_once(num_rows: int) -> int:
    """Vectors of 16 a row whose sums the machine's registers hold."""
    if get_host_cpu_features().get("avx512f"):
        return 4
    return {1: 4, 2: 2}.get(num_rows, 1)


def _block(num_rows: int, num_vectors: int) -> Any:
    """A product's innermost part, whose sums stay in registers.

    ``out[row + r, column + j] += sum_k x[row + r, start + k] * w[first + k, w_column + j]`` for r
    below ``num_rows`` and j below 16 ``num_vectors``; k goes from 0 to ``size`` (at least 1), one
    after the other. Loops in Python's syntax leave the choice of registers to LLVM, which then stores and
    loads every sum at every k: half as fast at one row, a quarter at five.
    """

    @intrinsic
    def block(_: Any, x: Any, row: Any, start: Any, w: Any, first: Any, w_column: Any, size: Any,
              out: Any, column: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            real, index = ir.FloatType(), ir.IntType(64)
            vector = ir.VectorType(real, _LANES)
            arrays = {
                name: context.make_array(signature.args[i])(context, builder, args[i])
                for i, name in ((0, "x"), (3, "w"), (7, "out"))
            }
            row, start, first, w_column, size, column = (args[i] for i in (1, 2, 4, 5, 6, 8))

            def constant(value: int) -> Any:
                return ir.Constant(index, value)

            def at(base: Any, *offsets: Any) -> Any:
                for offset in offsets:
                    base = builder.gep(base, [offset], source_etype=real)
                return base

            def width(name: str) -> Any:
                return builder.extract_value(arrays[name].shape, 1)

            def place(name: str, *, row: Any, column: Any) -> Any:
                return at(arrays[name].data, builder.mul(row, width(name)), column)

            def load(pointer: Any) -> Any:
                loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), typ=vector)
                loaded.align = 4
                return loaded

            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{_LANES}f32"
            )
            undefined = ir.Constant(vector, ir.Undefined)
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
            rows = [builder.add(row, constant(r)) for r in range(num_rows)]
            sources = [place("x", row=r, column=start) for r in rows]
            at_once = min(num_vectors, _vectors_at_once(num_rows))
            for group in range(0, num_vectors, at_once):
                lanes = [constant(_LANES * (group + i)) for i in range(at_once)]
                outs = [[at(place("out", row=r, column=column), i) for i in lanes] for r in rows]
                begun = [[load(pointer) for pointer in pointers] for pointers in outs]
                before = builder.block
                body, after = (builder.append_basic_block(name) for name in ("body", "after"))
                builder.branch(body)
                builder.position_at_end(body)
                k = builder.phi(index)
                sums = [[builder.phi(vector) for _ in lanes] for _ in rows]
                weights = place("w", row=builder.add(first, k), column=w_column)
                factors = [load(at(weights, i)) for i in lanes]
                added = []
                for source, line in zip(sources, sums, strict=True):
                    one = builder.load(at(source, k), typ=real)
                    one = builder.insert_element(undefined, one, ir.Constant(ir.IntType(32), 0))
                    one = builder.shuffle_vector(one, undefined, zeros)
                    pairs = zip(factors, line, strict=True)
                    added.append([builder.call(fma, [one, w, total]) for w, total in pairs])
                following = builder.add(k, constant(1))
                k.add_incoming(constant(0), before)
                k.add_incoming(following, body)
                for line, old, new in zip(sums, begun, added, strict=True):
                    for total, old_part, new_part in zip(line, old, new, strict=True):
                        total.add_incoming(old_part, before)
                        total.add_incoming(new_part, body)
                builder.cbranch(builder.icmp_signed("<", following, size), body, after)
                builder.position_at_end(after)
                for pointers, parts in zip(outs, added, strict=True):
                    for pointer, part in zip(pointers, parts, strict=True):
                        target = builder.bitcast(pointer, vector.as_pointer())
                        builder.store(part, target).align = 4
            return context.get_dummy_value()

        return types.void(x, row, start, w, first, w_column, size, out, column), generate

    return block


_BLOCK_1, _BLOCK_2, _BLOCK_3, _BLOCK_4, _BLOCK_5, _BLOCK_6 = (_block(r, 4) for r in range(1, 7))
_NARROW_1, _NARROW_2, _NARROW_3, _NARROW_4, _NARROW_5, _NARROW_6 = (
    _block(r, 2) for r in range(1, 7)
)
_NARROW = 2 * _LANES


@_EXACT
def _add_panel(x, row, stop, start, w, first, w_column, size, out, column):
    """A block of 64 columns for the rows up to ``stop``, a few at a time."""
    while row < stop:
        left = stop - row
        if left == 1:
            _BLOCK_1(x, row, start, w, first, w_column, size, out, column)
            row += 1
        elif left == 2:
            _BLOCK_2(x, row, start, w, first, w_column, size, out, column)
            row += 2
        elif left == 3:
            _BLOCK_3(x, row, start, w, first, w_column, size, out, column)
            row += 3
        elif left == 4 or left == 7 or left == 8:
            _BLOCK_4(x, row, start, w, first, w_column, size, out, column)
            row += 4
        elif left == 5 or left == 9 or left == 10:
            _BLOCK_5(x, row, start, w, first, w_column, size, out, column)
            row += 5
        else:
            _BLOCK_6(x, row, start, w, first, w_column, size, out, column)
            row += 6


@_EXACT
def _add_narrow(x, row, stop, start, w, first, w_column, size, out, column):
    """A block of 32 columns for the rows up to ``stop``."""
    while row < stop:
        left = stop - row
        if left == 1:
            _NARROW_1(x, row, start, w, first, w_column, size, out, column)
            row += 1
        elif left == 2:
            _NARROW_2(x, row, start, w, first, w_column, size, out, column)
            row += 2
        elif left == 3:
            _NARROW_3(x, row, start, w, first, w_column, size, out, column)
            row += 3
        elif left == 4 or left == 7 or left == 8:
            _NARROW_4(x, row, start, w, first, w_column, size, out, column)
            row += 4
        elif left == 5 or left == 9 or left == 10:
            _NARROW_5(x, row, start, w, first, w_column, size, out, column)
            row += 5
        else:
            _NARROW_6(x, row, start, w, first, w_column, size, out, column)
            row += 6


@_EXACT
def add_product(x, panels, out):
    """``out += x @ w``, where ``panels = pack(w)``.

    Args:
        x: [R, >= K].
        panels: [P, K, 64].
        out: [R, 64 P].
    """
    for p in range(panels.shape[0]):
        _add_panel(x, 0, x.shape[0], 0, panels[p], 0, 0, panels.shape[1], out, p * PANEL)


@_EXACT
def choose(states, panels, num_ids, ids):
    """The likeliest token of every row; of equally likely ones the first.

    Args:
        states: [R, D].
        panels: the packed LM head, [P, D, 64].
        num_ids: choose among the first so many.
        ids: [R] int64, overwritten.
    """
    logits = np.zeros((states.shape[0], panels.shape[0] * PANEL), np.float32)
    add_product(states, panels, logits)
    for r in range(states.shape[0]):
        row = logits[r, :num_ids]
        best = _maximum(row)
        j = 0
        # A NaN equals nothing, not even itself.
        while j < num_ids - 1 and row[j] != best:
            j += 1
        ids[r] = j


# ---------------------------------------------------------------- a row at a time


@_REORDER
def _maximum(x):
    best = x[0]
    for j in range(1, x.shape[0]):
        best = max(best, x[j])
    return best


@_REORDER
def _sum(x):
    total = _ZERO
    for j in range(x.shape[0]):
        total += x[j]
    return total


@_REORDER
def _sum_squares(x, mean):
    total = _ZERO
    for j in range(x.shape[0]):
        total += (x[j] - mean) * (x[j] - mean)
    return total


@_EXACT
def _normalise(x, mean, eps, out):
    scale = _ONE / np.sqrt(_sum_squares(x, mean) / np.float32(x.shape[0]) + eps)
    for j in range(x.shape[0]):
        out[j] = (x[j] - mean) * scale


@_EXACT
def _exp(x, bits, powers):
    """``x = exp(x)`` in place; ``powers`` is ``bits`` (int32) read as float32."""
    for j in range(x.shape[0]):
        t = min(max(x[j], -_LIMIT), _LIMIT) * _LOG2_E
        whole = (t + _ROUND) - _ROUND
        f = t - whole
        x[j] = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
        bits[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for j in range(x.shape[0]):
        x[j] *= powers[j]


@_EXACT
def _softmax(x, size, bits, powers):
    """Over the first ``size`` of x, in place; x has room for whole vectors, which become zero."""
    padded = (size + PANEL - 1) // PANEL * PANEL
    x[size:padded] = -np.inf
    line = x[:padded]
    best = _maximum(line)
    for j in range(padded):
        line[j] -= best
    _exp(line, bits, powers)
    # What exp makes of the end is too little to count beside the largest, which is one.
    scale = _ONE / _sum(line)
    for j in range(padded):
        line[j] *= scale
    x[size:padded] = _ZERO


@_EXACT
def _silu(x, scratch, bits, powers):
    """``x = x * sigmoid(x)`` in place."""
    for j in range(x.shape[0]):
        scratch[j] = -x[j]
    _exp(scratch[: x.shape[0]], bits, powers)
    for j in range(x.shape[0]):
        x[j] = x[j] / (_ONE + scratch[j])


@_EXACT
def _turn(x, half, cos, sin, factor):
    """Rotate the two halves of a head into each other."""
    a, b = x[:half], x[half : 2 * half]
    for i in range(half):
        c, s = cos[i] * factor, sin[i] * factor
        u, v = a[i] * c - b[i] * s, b[i] * c + a[i] * s
        a[i], b[i] = u, v


@_EXACT
def _attend(
    x, start, lo, hi, keys, values, first, begin, ancestors, scores, line, bits, powers, out, column
):
    """One head of the rows ``lo..hi - 1``, which stand at the columns from ``begin`` on.

    Args:
        x: [R, ..] scaled queries, from column ``start`` on.
        keys: [Dh, columns], at least 64 more than are in use.
        values: [columns, Dh].
        first: of the columns that are seen.
        ancestors: [hi - lo, hi - lo] bool: which of each other the rows see; empty: those before.
        out: [R, >= column + Dh + 31], overwritten from ``column`` on.
    """
    num_rows, head_dim = hi - lo, keys.shape[0]
    origin = min(first, begin)
    end = begin + num_rows - origin
    scores[lo:hi, : end + PANEL] = _ZERO
    for j in range(0, end, PANEL):
        _add_panel(x, lo, hi, start, keys, 0, origin + j, head_dim, scores, j)
    for i in range(num_rows):
        row = scores[lo + i]
        # A row of padding sees itself: a softmax over nothing would be NaN.
        seen = min(first, begin + i) - origin
        if ancestors.shape[0] == 0:
            size = begin + i + 1 - origin - seen
            _softmax(row[seen:], size, bits, powers)
            row[seen + size : end] = _ZERO
        else:
            # What a branch sees is brought together: it is a chain to the last bit.
            size = begin - origin - seen
            line[:size] = row[seen : seen + size]
            total = size
            for k in range(num_rows):
                if ancestors[i, k]:
                    line[total] = row[seen + size + k]
                    total += 1
            _softmax(line, total, bits, powers)
            row[seen : seen + size] = line[:size]
            total = size
            for k in range(num_rows):
                row[seen + size + k] = _ZERO
                if ancestors[i, k]:
                    row[seen + size + k] = line[total]
                    total += 1
        row[:seen] = _ZERO
        out[lo + i, column : column + head_dim] = _ZERO
    # What a block adds beyond this head, the next one overwrites.
    for j in range(0, head_dim, _NARROW):
        _add_narrow(scores, lo, hi, 0, values, origin, j, end, out, column + j)


# ---------------------------------------------------------------- whole passes


@_EXACT
def decoder_pass(
    rows, qkv, attention_out, gate_up, down, final_norm, eps, cos, sin, keys, values, first, begin,
    positions, ancestors, states,
):  # fmt: skip
    """R new rows of each of B answers through a Llama decoder, behind what a cache holds.

    Weights are packed; those behind a norm hold its factors. H query heads, G key heads.

    Args:
        rows: [B R, D] embeddings.
        qkv: [L, P, D, 64] for (H + 2 G) Dh columns.
        attention_out: [L, P, H Dh, 64].
        gate_up: [L, P, D, 64] for 2 F columns.
        down: [L, P, F, 64].
        final_norm: [D].
        eps: float32, of the norms.
        cos, sin: [positions, Dh / 2].
        keys: [L, B, G, Dh, columns], at least 64 more columns than are in use; written.
        values: [L, B, G, columns, Dh]; written.
        first: [B] int64: of the columns that are seen.
        begin: [B] int64: column of the first new row.
        positions: [B R] int64.
        ancestors: [R, R] bool: which of each other the rows see; empty: those before them.
        states: [B R, D], overwritten: after the final norm.
    """
    num_layers, batch, kv_heads, head_dim, num_columns = keys.shape
    num_rows, width = rows.shape
    each = num_rows // batch
    num_heads, ffn, half = attention_out.shape[2] // head_dim, down.shape[2], head_dim // 2
    group = num_heads // kv_heads
    query_scale = _ONE / np.sqrt(np.float32(head_dim))
    room = max(num_columns, 2 * ffn) + PANEL
    bits = np.empty(room, np.int32)
    powers = bits.view(np.float32)
    line = np.empty(room, np.float32)
    scores = np.empty((num_rows, room), np.float32)
    x = np.zeros((num_rows, down.shape[1] * PANEL), np.float32)
    x[:, :width] = rows
    normed = np.empty((num_rows, width), np.float32)
    projected = np.empty((num_rows, qkv.shape[1] * PANEL), np.float32)
    attended = np.zeros((num_rows, num_heads * head_dim + _NARROW), np.float32)
    both = np.empty((num_rows, gate_up.shape[1] * PANEL), np.float32)
    for layer in range(num_layers):
        for r in range(num_rows):
            _normalise(x[r, :width], _ZERO, eps, normed[r])
        projected[:] = _ZERO
        add_product(normed, qkv[layer], projected)
        for r in range(num_rows):
            entry = r // each
            column, row = begin[entry] + r % each, projected[r]
            turn_cos, turn_sin = cos[positions[r]], sin[positions[r]]
            for h in range(num_heads + kv_heads):
                factor = query_scale if h < num_heads else _ONE
                _turn(row[h * head_dim : (h + 1) * head_dim], half, turn_cos, turn_sin, factor)
            for g in range(kv_heads):
                new = row[(num_heads + g) * head_dim :]
                its_keys = keys[layer, entry, g]
                for d in range(head_dim):
                    its_keys[d, column] = new[d]
                new = row[(num_heads + kv_heads + g) * head_dim :]
                its_values = values[layer, entry, g, column]
                for d in range(head_dim):
                    its_values[d] = new[d]
        for entry in range(batch):
            lo, hi = entry * each, (entry + 1) * each
            for h in range(num_heads):
                _attend(
                    projected, h * head_dim, lo, hi,
                    keys[layer, entry, h // group], values[layer, entry, h // group],
                    first[entry], begin[entry], ancestors,
                    scores, line, bits, powers, attended, h * head_dim,
                )  # fmt: skip
        add_product(attended, attention_out[layer], x)
        for r in range(num_rows):
            _normalise(x[r, :width], _ZERO, eps, normed[r])
        both[:] = _ZERO
        add_product(normed, gate_up[layer], both)
        for r in range(num_rows):
            gate, up = both[r, :ffn], both[r, ffn : 2 * ffn]
            _silu(gate, line, bits, powers)
            for j in range(ffn):
                gate[j] *= up[j]
        add_product(both, down[layer], x)
    for r in range(num_rows):
        _normalise(x[r, :width], _ZERO, eps, states[r])
        for j in range(width):
            states[r, j] *= final_norm[j]

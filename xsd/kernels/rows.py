"""What happens to one row at a time, and attention."""

from __future__ import annotations

from math import erf

import numpy as np

from xsd.kernels import PANEL
from xsd.kernels.options import exact, reorder
from xsd.kernels.products import NARROW, add_narrow, add_panel

ZERO, ONE = np.float32(0.0), np.float32(1.0)
_HALF, _SQRT_HALF = np.float32(0.5), np.float32(0.7071067811865476)
_LOG2_E = np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)  # adding 1.5 * 2**23 leaves no room for a fraction
_LIMIT = np.float32(87.0)
# 2**f for |f| <= 1/2, to single precision.
_C1, _C2, _C3 = np.float32(0.6931471806), np.float32(0.2402265070), np.float32(0.0555041087)
_C4, _C5, _C6 = np.float32(0.0096181291), np.float32(0.0013333558), np.float32(0.0001540353)


@reorder
def maximum(x):
    best = x[0]
    for j in range(1, x.shape[0]):
        best = max(best, x[j])
    return best


@reorder
def _sum(x):
    total = ZERO
    for j in range(x.shape[0]):
        total += x[j]
    return total


@reorder
def _sum_squares(x, mean):
    total = ZERO
    for j in range(x.shape[0]):
        total += (x[j] - mean) * (x[j] - mean)
    return total


@exact
def normalise(x, mean, eps, out):
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps)``: with a mean of zero, RMSNorm without its
    factors."""
    scale = ONE / np.sqrt(_sum_squares(x, mean) / np.float32(x.shape[0]) + eps)
    for j in range(x.shape[0]):
        out[j] = (x[j] - mean) * scale


@exact
def centre(x, eps, out):
    """LayerNorm without its factors."""
    normalise(x, _sum(x) / np.float32(x.shape[0]), eps, out)


@exact
def _begin_exp(x, shift, bits):
    """Of ``exp(x - shift)``: the fraction's part into x, the exponent's into ``bits`` (int32)."""
    for j in range(x.shape[0]):
        t = min(max(x[j] - shift, -_LIMIT), _LIMIT) * _LOG2_E
        whole = (t + _ROUND) - _ROUND
        f = t - whole
        x[j] = ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
        bits[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)


@reorder
def _end_exp(x, powers):
    """``x *= powers``, which are the bits read as float32; the sum."""
    total = ZERO
    for j in range(x.shape[0]):
        x[j] *= powers[j]
        total += x[j]
    return total


@exact
def softmax(x, size, bits, powers):
    """Over the first ``size`` of x, in place, but for the factor that is returned.

    x has room for whole vectors, which become zero.
    """
    padded = (size + PANEL - 1) // PANEL * PANEL
    x[size:padded] = -np.inf
    line = x[:padded]
    _begin_exp(line, maximum(line), bits)
    # What exp makes of the end is too little to count beside the largest, which is one.
    total = _end_exp(line, powers)
    x[size:padded] = ZERO
    return ONE / total


@exact
def silu(x, scratch, bits, powers):
    """``x = x * sigmoid(x)`` in place."""
    line = scratch[: x.shape[0]]
    for j in range(x.shape[0]):
        line[j] = -x[j]
    _begin_exp(line, ZERO, bits)
    for j in range(x.shape[0]):
        x[j] = x[j] / (ONE + line[j] * powers[j])


@exact
def gelu(x):
    """``x = x * Phi(x)`` in place."""
    for j in range(x.shape[0]):
        x[j] *= _HALF * (ONE + np.float32(erf(x[j] * _SQRT_HALF)))


@exact
def turn(x, half, cos, sin, factor):
    """Rotate the two halves of a head into each other."""
    a, b = x[:half], x[half : 2 * half]
    for i in range(half):
        c, s = cos[i] * factor, sin[i] * factor
        u, v = a[i] * c - b[i] * s, b[i] * c + a[i] * s
        a[i], b[i] = u, v


@exact
def place(x, key_start, value_start, lo, hi, keys, values, column):
    """Put one head's keys and values, of rows ``lo..hi - 1``, at the columns from ``column`` on."""
    head_dim = keys.shape[0]
    # Rows innermost: their keys are neighbours.
    for d in range(head_dim):
        line = keys[d]
        for r in range(lo, hi):
            line[column + r - lo] = x[r, key_start + d]
    for r in range(lo, hi):
        line = values[column + r - lo]
        for d in range(head_dim):
            line[d] = x[r, value_start + d]


@exact
def attend(
    x, start, lo, hi, keys, values, hole_start, hole_end, begin, ancestors,
    scores, line, bits, powers, out, column,
):  # fmt: skip
    """One head of the rows ``lo..hi - 1``: all see the columns before ``begin`` that are not in
    the hole, and further ones as ``ancestors`` says.

    Args:
        x: [R, ..] scaled queries, from column ``start`` on.
        keys: [Dh, columns], at least 64 more than are in use.
        values: [columns, Dh].
        hole_start, hole_end: columns of padding.
        ancestors: [hi - lo, n] bool: which of the n columns from ``begin`` on; of no rows: a row
            stands at each, and sees those before it and itself.
        out: [R, >= column + Dh + 31], overwritten from ``column`` on.
    """
    num_rows, head_dim = hi - lo, keys.shape[0]
    is_chain = ancestors.shape[0] == 0
    num_after = num_rows if is_chain else ancestors.shape[1]
    origin = 0 if hole_start else min(hole_end, begin)
    factors = np.empty(num_rows, np.float32)
    end = begin + num_after - origin
    scores[lo:hi, : end + PANEL] = ZERO
    for j in range(0, end, PANEL):
        add_panel(x, lo, hi, start, keys, 0, origin + j, head_dim, scores, j)
    for i in range(num_rows):
        row = scores[lo + i]
        if is_chain and not hole_start:
            first = min(hole_end, begin + i) - origin
            stop = begin + i + 1 - origin
            factors[i] = softmax(row[first:], stop - first, bits, powers)
            row[:first] = ZERO
            row[stop:end] = ZERO
        else:
            # What is seen is brought together: any row is a chain to the last bit.
            size = _gather(row, origin, hole_start, hole_end, begin, ancestors, i, line)
            factors[i] = softmax(line, size, bits, powers)
            row[:end] = ZERO
            _scatter(line, origin, hole_start, hole_end, begin, ancestors, i, row)
        out[lo + i, column : column + head_dim] = ZERO
    # What a block adds beyond this head, the next one overwrites.
    for j in range(0, head_dim, NARROW):
        add_narrow(scores, lo, hi, 0, values, origin, j, end, out, column + j)
    for i in range(num_rows):
        row = out[lo + i, column : column + head_dim]
        for d in range(head_dim):
            row[d] *= factors[i]


@exact
def _gather(row, origin, hole_start, hole_end, begin, ancestors, i, line):
    """Scores of the columns that row ``i`` sees, one after the other; how many they are."""
    size = 0
    for c in range(origin, hole_start):
        line[size] = row[c - origin]
        size += 1
    for c in range(max(origin, min(hole_end, begin)), begin):
        line[size] = row[c - origin]
        size += 1
    is_chain = ancestors.shape[0] == 0
    # A row of padding sees itself: a softmax over nothing would be NaN.
    stop = i + 1 if is_chain else ancestors.shape[1]
    for k in range(max(0, min(hole_end, begin + i) - begin), stop):
        if is_chain or ancestors[i, k]:
            line[size] = row[begin + k - origin]
            size += 1
    return size


@exact
def _scatter(line, origin, hole_start, hole_end, begin, ancestors, i, row):
    """The way back."""
    size = 0
    for c in range(origin, hole_start):
        row[c - origin] = line[size]
        size += 1
    for c in range(max(origin, min(hole_end, begin)), begin):
        row[c - origin] = line[size]
        size += 1
    is_chain = ancestors.shape[0] == 0
    stop = i + 1 if is_chain else ancestors.shape[1]
    for k in range(max(0, min(hole_end, begin + i) - begin), stop):
        if is_chain or ancestors[i, k]:
            row[begin + k - origin] = line[size]
            size += 1

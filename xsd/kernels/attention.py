"""Attention of the rows of a pass to what a cache holds and to each other."""

from __future__ import annotations

from xsd.kernels import PANEL
from xsd.kernels.options import inner
from xsd.kernels.products import NARROW, add_narrow, add_panel
from xsd.kernels.rows import ZERO, softmax


@inner
def place(x, key_start, value_start, lo, hi, keys, values, column):
    """Put one head's keys and values, of rows ``lo..hi - 1``, at the columns from ``column`` on."""
    head_dim = keys.shape[0]
    for r in range(lo, hi):
        key = x[r, key_start : key_start + head_dim]
        value = x[r, value_start : value_start + head_dim]
        row = values[column + r - lo]
        for d in range(head_dim):
            keys[d, column + r - lo] = key[d]
            row[d] = value[d]


@inner
def attend(
    x, start, lo, hi, keys, values, hole_start, hole_end, begin, ancestors, scores, factors,
    out, column,
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
        scores: [R, >= columns + 64], overwritten; factors: [R], too.
        out: [R, >= column + Dh + 31], overwritten from ``column`` on.
    """
    num_rows, head_dim = hi - lo, keys.shape[0]
    num_after = num_rows if ancestors.shape[0] == 0 else ancestors.shape[1]
    origin = 0 if hole_start else min(hole_end, begin)
    end = begin + num_after - origin
    for r in range(lo, hi):
        scores[r, : end + PANEL] = ZERO
    for j in range(0, end, PANEL):
        add_panel(x, lo, hi, start, keys, 0, origin + j, head_dim, scores, j)
    in_place = ancestors.shape[0] == 0 and not hole_start
    for i in range(num_rows):
        row = scores[lo + i]
        if in_place:
            first, stop = _first_seen(hole_end, begin, i), begin - origin + i + 1
            factors[lo + i] = softmax(row[first:], stop - first)
            for j in range(first):
                row[j] = ZERO
            for j in range(stop, end):
                row[j] = ZERO
        else:
            # What is seen is brought together: any row is a chain to the last bit.
            first, size = _gather(row, origin, hole_start, hole_end, begin, ancestors, i)
            factors[lo + i] = softmax(row[first:], size)
            end_seen = first + size
            _scatter(row, origin, hole_start, hole_end, begin, ancestors, i, num_after, end_seen)
        out[lo + i, column : column + head_dim] = ZERO
    # What a block adds beyond this head, the next one overwrites.
    for j in range(0, head_dim, NARROW):
        add_narrow(scores, lo, hi, 0, values, origin, j, end, out, column + j)
    for r in range(lo, hi):
        row, factor = out[r, column : column + head_dim], factors[r]
        for d in range(head_dim):
            row[d] *= factor


@inner
def _first_seen(hole_end, begin, i):
    """From which of the columns from ``begin`` on row ``i`` may look.

    A row of padding sees itself: a softmax over nothing would be NaN.
    """
    return max(0, min(hole_end, begin + i) - begin)


@inner
def _gather(row, origin, hole_start, hole_end, begin, ancestors, i):
    """Move the scores of the columns that row ``i`` sees together; where they begin, how many."""
    behind = max(origin, min(hole_end, begin)) - origin
    first, size = behind, begin - origin - behind
    if hole_start:
        for j in range(size):
            row[hole_start + j] = row[behind + j]
        first, size = 0, hole_start + size
    is_chain = ancestors.shape[0] == 0
    stop = i + 1 if is_chain else ancestors.shape[1]
    for k in range(_first_seen(hole_end, begin, i), stop):
        if is_chain or ancestors[i, k]:
            row[first + size] = row[begin - origin + k]
            size += 1
    return first, size


@inner
def _scatter(row, origin, hole_start, hole_end, begin, ancestors, i, num_after, end):
    """The way back, from the last of them, before ``end``; zero where nothing is seen."""
    is_chain = ancestors.shape[0] == 0
    from_k = _first_seen(hole_end, begin, i)
    for k in range(num_after - 1, -1, -1):
        column = begin - origin + k
        if k >= from_k and (k <= i if is_chain else ancestors[i, k]):
            end -= 1
            row[column] = row[end]
        else:
            row[column] = ZERO
    behind = max(origin, min(hole_end, begin)) - origin
    if hole_start:
        for j in range(begin - behind - 1, -1, -1):
            row[behind + j] = row[hole_start + j]
    row[hole_start:behind] = ZERO

"""Pictures to a model's input: Pillow's bicubic resize, bit by bit, and a table of floats."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from xsd.kernels.options import exact, inner

_BITS = 22
"""Of the fraction in Pillow's fixed-point weights."""


class Taps(NamedTuple):
    """Which pixels of a line go into each of N new ones, and how much."""

    first: Int[np.ndarray, " N"]
    counts: Int[np.ndarray, " N"]
    weights: Int[np.ndarray, "N most"]
    """Fixed-point numbers, int32."""


def bicubic(num_old: int, num_new: int, start: int, stop: int) -> Taps:
    """Taps of the new pixels ``start..stop - 1`` of a line of ``num_new``.

    Shrinking widens the filter (Keys' cubic, a = -1/2), as Pillow does. Every operation is in
    double precision and in Pillow's order.
    """
    scale = num_old / num_new
    wide = max(scale, 1.0)
    centres = (np.arange(start, stop) + 0.5) * scale
    first = np.maximum((centres - 2.0 * wide + 0.5).astype(np.int64), 0)
    count = np.minimum((centres + 2.0 * wide + 0.5).astype(np.int64), num_old) - first
    steps = np.arange(count.max())
    at = np.abs((steps + first[:, None] - centres[:, None] + 0.5) * (1.0 / wide))
    near = ((-0.5 + 2.0) * at - (-0.5 + 3.0)) * at * at + 1.0
    far = (((at - 5.0) * at + 8.0) * at - 4.0) * -0.5
    weights = np.where(at < 1.0, near, np.where(at < 2.0, far, 0.0))
    weights[steps >= count[:, None]] = 0.0
    # One after the other: NumPy's own sum pairs them.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    fixed = np.trunc(weights * (1 << _BITS) + np.copysign(0.5, weights)).astype(np.int32)
    return Taps(first, count, fixed)


@exact
def normalise_image(
    image, first_column, columns, column_weights, first_row, rows, row_weights, table, out
):
    """Resize and crop, then look every byte up.

    Args:
        image: [h, w, 3] uint8.
        first_column, columns, column_weights: ``Taps`` of W new columns.
        first_row, rows, row_weights: of H new rows.
        table: [3, 256] float32.
        out: [3, H, W], overwritten.
    """
    begin, width = first_row[0], out.shape[2]
    narrow = np.empty((first_row[-1] + rows[-1] - begin, 3 * width), np.uint8)
    _narrow(image[begin:], first_column, columns, column_weights, narrow)
    sums = np.empty(3 * width, np.int32)
    _shorten(narrow, begin, first_row, rows, row_weights, sums, table, out)


@inner
def _narrow(image, first, count, weights, narrow):
    """Every row on its own; three colours side by side."""
    half = np.int32(1 << (_BITS - 1))
    for y in range(narrow.shape[0]):
        old, new = image[y], narrow[y]
        for x in range(first.shape[0]):
            start, row = first[x], weights[x]
            red = green = blue = half
            for t in range(count[x]):
                weight = row[t]
                red = np.int32(red + weight * np.int32(old[start + t, 0]))
                green = np.int32(green + weight * np.int32(old[start + t, 1]))
                blue = np.int32(blue + weight * np.int32(old[start + t, 2]))
            new[3 * x] = _byte(red)
            new[3 * x + 1] = _byte(green)
            new[3 * x + 2] = _byte(blue)


@inner
def _shorten(narrow, begin, first, count, weights, sums, table, out):
    """Whole rows at once, and into the table."""
    half = np.int32(1 << (_BITS - 1))
    for y in range(first.shape[0]):
        for j in range(sums.shape[0]):
            sums[j] = half
        for t in range(count[y]):
            weight, old = weights[y, t], narrow[first[y] - begin + t]
            for j in range(sums.shape[0]):
                sums[j] += weight * np.int32(old[j])
        for c in range(3):
            values, line = table[c], out[c, y]
            for x in range(line.shape[0]):
                line[x] = values[_byte(sums[3 * x + c])]


@inner
def _byte(total):
    return np.uint8(min(max(total >> _BITS, 0), 255))

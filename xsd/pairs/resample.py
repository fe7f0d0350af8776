"""Pillow's bicubic resize where a GPU does the sums: equal to it byte by byte.

Pillow resizes bytes in two passes, with weights rounded to 22 bits and a result rounded to bytes
after each. Integers of that size are exact in double precision, so a pass is a matrix product.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

_BITS = 22
_SUPPORT = 2.0
_SHARPNESS = -0.5
"""``a`` of the cubic kernel (Keys 1981), as Pillow has it."""
BICUBIC = 3


def resize(
    images: UInt8[Tensor, "N 3 H W"], height: int, width: int
) -> Float[Tensor, "N 3 h w"] | None:
    """Whole numbers from 0 to 255, in double precision; None: this Pillow does it otherwise."""
    across_first = _across_first(*images.shape[2:], height, width)
    return None if across_first is None else _resize(images, height, width, across_first)


def _resize(
    images: UInt8[Tensor, "N 3 H W"], height: int, width: int, across_first: bool
) -> Float[Tensor, "N 3 h w"]:
    exact, device = images.double(), images.device
    across = weights(images.shape[3], width).to(device).t()
    down = weights(images.shape[2], height).to(device)
    if across_first:
        return _pass(down @ _pass(exact @ across))
    return _pass(_pass(down @ exact) @ across)


@lru_cache(maxsize=64)
def _across_first(height: int, width: int, new_height: int, new_width: int) -> bool | None:
    """Which pass comes first is a matter of sizes and of Pillow's release: it is asked."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    said = np.asarray(Image.fromarray(noise).resize((new_width, new_height), BICUBIC))
    image = torch.from_numpy(noise).movedim(-1, 0)[None]
    for across_first in (True, False):
        found = _resize(image, new_height, new_width, across_first)
        if np.array_equal(found[0].movedim(0, -1).byte().numpy(), said):
            return across_first
    return None


def _pass(sums: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return ((sums + (1 << (_BITS - 1))) / (1 << _BITS)).floor_().clamp_(0, 255)


@lru_cache(maxsize=32)
def weights(num_in: int, num_out: int) -> Float[Tensor, "out in"]:
    """Whole numbers: by what each pixel goes into each of the result's, times 2^22."""
    scale = num_in / num_out
    stretch = max(scale, 1.0)
    table = torch.zeros(num_out, num_in, dtype=torch.float64)
    for out in range(num_out):
        centre = (out + 0.5) * scale
        first = max(0, int(centre - _SUPPORT * stretch + 0.5))
        last = min(num_in, int(centre + _SUPPORT * stretch + 0.5))
        found = [_cubic((place - centre + 0.5) / stretch) for place in range(first, last)]
        total = sum(found)
        for place, weight in enumerate(found, start=first):
            exact = weight / total * (1 << _BITS)
            table[out, place] = int(exact - 0.5) if exact < 0 else int(exact + 0.5)
    return table


def _cubic(x: float) -> float:
    x, a = abs(x), _SHARPNESS
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0

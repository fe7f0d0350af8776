"""How states are rounded when they are stored, and what they are when they are read again.

fp8 is e4m3: 3 bits of mantissa. Its largest number is 448, so every position has a factor of its
own that brings its largest state there; small states keep their relative precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
)
"""What a position's states are stored in."""
VISUAL_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({**DTYPES, "fp8": torch.bfloat16})
"""What a clip's visual states are stored in: they are few, so they are never rounded to fp8."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def encode(states: Tensor, dtype: str) -> tuple[Tensor, Float[Tensor, "*rows"] | None]:
    """Rounded states [*rows, D], and the factor of each row (fp8) or None.

    States that are fp8 already come with no factor, so they are not to be given.
    """
    if dtype != "fp8":
        return states.to(DTYPES[dtype]), None
    exact = states.float()
    scale = exact.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    return (exact / scale[..., None]).to(DTYPES[dtype]), scale


def decode(stored: Tensor, scale: Float[Tensor, "*rows"] | None) -> Float[Tensor, "*rows D"]:
    """States as they are used: of fp8 float32, else a view of what is stored."""
    return stored if scale is None else stored.float() * scale[..., None]

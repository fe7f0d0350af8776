"""Pooling of a clip's visual states: the same in extraction, training and live decoding."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

MAX_VISUAL = 128


def pool_visual(
    states: Float[Tensor, "visual D"], max_vectors: int = MAX_VISUAL
) -> Float[Tensor, "K D"]:
    """At most ``max_vectors`` vectors: means over runs of neighbours of (nearly) equal length.

    The run of row ``i`` is ``i * K // visual``; fewer rows than ``max_vectors`` stay as they are.
    """
    rows = states.shape[0]
    if rows <= max_vectors:
        return states
    run, size = _runs(rows, max_vectors, states.device)
    pooled = torch.zeros(max_vectors, states.shape[1], device=states.device, dtype=torch.float32)
    pooled.index_add_(0, run, states.float())
    return (pooled / size).to(states.dtype)


@lru_cache(maxsize=16)
def _runs(rows: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which run every row is in, and their lengths [count, 1]."""
    # Kept, and not of the mode in which they happened to be made.
    with torch.inference_mode(False):
        run = torch.arange(rows, device=device) * count // rows
        return run, torch.bincount(run, minlength=count)[:, None]

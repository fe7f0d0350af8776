"""Pooling of a clip's visual states: the same in extraction, training and live decoding."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xsd import kernels

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
    if states.device.type == "cpu" and states.dtype == torch.float32:
        # A small pair's whole answer takes a few milliseconds: one call, not seven.
        means = np.empty((max_vectors, states.shape[1]), np.float32)
        kernels.pool(states.contiguous().numpy(force=True), means)
        return torch.from_numpy(means)
    run = torch.arange(rows, device=states.device) * max_vectors // rows
    pooled = torch.zeros(max_vectors, states.shape[1], device=states.device, dtype=torch.float32)
    pooled.index_add_(0, run, states.float())
    size = torch.bincount(run, minlength=max_vectors).clamp(min=1)
    return (pooled / size[:, None]).to(states.dtype)

"""From states to the likeliest tokens."""

from __future__ import annotations

import numpy as np

from xsd.kernels import PANEL
from xsd.kernels.options import exact, inner
from xsd.kernels.products import add_product
from xsd.kernels.rows import ZERO, maximum


@exact
def choose(states, panels, num_ids, ids):
    """The likeliest token of every row; of equally likely ones the first.

    Args:
        states: [R, D].
        panels: the packed LM head, [P, D, 64].
        num_ids: choose among the first so many.
        ids: [R] int64, overwritten.
    """
    choose_in(
        states,
        panels,
        num_ids,
        np.empty((states.shape[0], panels.shape[0] * PANEL), np.float32),
        ids,
    )


@inner
def choose_in(states, panels, num_ids, logits, ids):
    """The same in ``logits``: [R, 64 P], overwritten."""
    logits[:] = ZERO
    add_product(states, panels, logits)
    for r in range(states.shape[0]):
        row = logits[r, :num_ids]
        best = maximum(row)
        j = 0
        # A NaN equals nothing, not even itself.
        while j < num_ids - 1 and row[j] != best:
            j += 1
        ids[r] = j

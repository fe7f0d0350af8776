"""From states to the likeliest tokens: all that greedy decoding wants of an LM head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xsd import kernels

COMPILED_BYTES = 1 << 28
"""Larger LM heads stay a library's: the compiled product keeps a copy of the weight."""


class Chooser:
    """The argmax of ``lm_head(states)``, all rows in one list.

    In single precision on a CPU it is a compiled product; a row's choice then does not depend on
    how many rows are asked about.
    """

    def __init__(self, lm_head: Any) -> None:
        self._lm_head = lm_head
        self.panels: np.ndarray | None = None
        """The packed weight; None: nothing is compiled."""
        if type(lm_head) is nn.Linear and len([*lm_head.parameters()]) == 1:
            weight = lm_head.weight.detach()
            on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
            if on_cpu and weight.nbytes <= COMPILED_BYTES:
                self.panels = kernels.pack(weight.t().numpy())
        self.num_ids = int(lm_head.out_features)

    def __call__(self, hidden: Float[Tensor, "*rows D"]) -> list[int]:
        ids: list[int] = self.best(hidden).tolist()
        return ids

    def best(self, hidden: Float[Tensor, "*rows D"]) -> Int[Tensor, " rows"]:
        """The same, where it is found: nothing waits for a GPU."""
        if self.panels is None:
            ids: Tensor = self._lm_head(hidden).argmax(-1).flatten()
            return ids
        states = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        chosen = np.empty(len(states), np.int64)
        kernels.choose(states.numpy(), self.panels, self.num_ids, chosen)
        return torch.from_numpy(chosen)

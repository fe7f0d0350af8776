"""From states to the likeliest tokens: all that greedy decoding wants of an LM head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from xsd import kernels

Chooser = Callable[[Float[Tensor, "*rows D"]], list[int]]

COMPILED_BYTES = 1 << 28
"""Larger LM heads stay a library's: the compiled product keeps a copy of the weight."""


def chooser(lm_head: Any) -> Chooser:
    """The fastest way to the argmax of ``lm_head(states)``, all rows in one list.

    In single precision on a CPU a compiled product; a row's choice then does not depend on how
    many rows are asked about.
    """
    if type(lm_head) is not nn.Linear or len([*lm_head.parameters()]) > 1:
        return lambda hidden: _argmax(lm_head(hidden))
    weight = lm_head.weight.detach()
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not on_cpu or weight.nbytes > COMPILED_BYTES:
        return lambda hidden: _argmax(nn.functional.linear(hidden, weight))
    panels, (num_ids, width) = kernels.pack(weight.t().numpy()), weight.shape

    def choose(hidden: Float[Tensor, "*rows D"]) -> list[int]:
        states = hidden.reshape(-1, width).contiguous()
        ids = np.empty(len(states), np.int64)
        kernels.choose(states.numpy(), panels, num_ids, ids)
        return ids.tolist()

    return choose


def _argmax(logits: Float[Tensor, "*rows V"]) -> list[int]:
    ids: list[int] = logits.argmax(-1).flatten().tolist()
    return ids

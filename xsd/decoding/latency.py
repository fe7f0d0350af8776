"""What an adapter costs: the ``a`` of the cost model, measured."""

from __future__ import annotations

import statistics
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xsd.adapters.base import Adapter
from xsd.adapters.rows import StepInputs
from xsd.clock import interleaved
from xsd.pairs.choose import Chooser

_NUM_VISUAL: Final = 128
"""Visual vectors of a clip, at most (axis K)."""


@torch.inference_mode()
def token_ms(adapter: Adapter, lm_head: Float[Tensor, "V Dv"], repeats: int = 40) -> float:
    """Milliseconds of one drafted token, adapter step and LM head, on the adapter's device.

    The median of ``repeats``, as live decoding steps it: one row into a cache. What the drafter
    takes for its own step is not in it.
    """
    like = next(adapter.parameters())
    widths = adapter.config.d_drafter, adapter.config.d_verifier
    drafter, verifier = (torch.zeros(1, 2, width).to(like) for width in widths)
    read = adapter.row.streams

    def row(drafter_rows: int = 1) -> StepInputs:
        return StepInputs(
            drafter=drafter[:, :drafter_rows] if "drafter" in read else None,
            verifier=verifier[:, :1] if "verifier" in read else None,
            token=adapter.read_tokens(verifier[:, :1]) if "token" in read else None,
        )

    visual = torch.zeros(1, _NUM_VISUAL, widths[1]).to(like) if adapter.row.visual else None
    cache = adapter.new_cache(1, 4, visual)
    # E2's drafter states run one position ahead of its rows.
    adapter.step(row(2 if adapter.memory == "drafter" else 1), cache)
    head = nn.Linear(widths[1], len(lm_head), bias=False, device="meta")
    head.weight = nn.Parameter(lm_head.to(like), requires_grad=False)
    choose = Chooser(head)

    def draft() -> None:
        cache.length = 1
        choose(adapter.step(row(), cache))

    times = interleaved({"token": draft}, like.device, repeats, warmup=5)
    return statistics.median(times["token"])

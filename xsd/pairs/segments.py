"""Attention for training rows in which several questions share one clip's prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

_NAME = "xsd_segments"


def attend_in_segments(language_model: Any) -> None:
    """Switch a transformers language model over; its forward then takes two more arguments.

    ``num_prefix`` positions come first and are causal; then segments of ``segment_length``, each
    of which sees the prefix and its own past.
    """
    AttentionInterface.register(_NAME, segment_attention)
    language_model.config._attn_implementation = _NAME


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    num_prefix: int,
    segment_length: int,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: states of B rows, H heads, prefix and segments in one axis.

    Exact, at a third of the work of one dense mask over the whole row.
    """
    batch, heads, _, dim = query.shape
    q, k, v = (x[:, :, :num_prefix] for x in (query, key, value))
    first = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    queries, keys, values = (
        x[:, :, num_prefix:].unflatten(2, (-1, segment_length)).transpose(1, 2).flatten(0, 1)
        for x in (query, key, value)
    )
    num_segments = len(queries) // batch
    keys = torch.cat([k.repeat_interleave(num_segments, 0), keys], dim=2)
    values = torch.cat([v.repeat_interleave(num_segments, 0), values], dim=2)
    sees = torch.ones(
        segment_length, num_prefix + segment_length, dtype=torch.bool, device=query.device
    )
    rest = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=sees.tril(num_prefix)
    )
    rest = rest.unflatten(0, (batch, num_segments)).transpose(1, 2).reshape(batch, heads, -1, dim)
    return torch.cat([first, rest], dim=2).transpose(1, 2), None

"""What ``xsd.pairs.gpu_kernels`` and ``four_bit_kernels`` compute, in plain torch: for machines
without Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from xsd.pairs.four_bit import FourBitWeight
from xsd.pairs.launch import Chip, HeadShape


def rotate_and_append(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    position: Tensor,
    depths: Tensor,
    keys: Tensor,
    values: Tensor,
    shape: HeadShape,
) -> Tensor:
    num_rows, start = len(qkv), int(position)
    split = qkv.view(num_rows, -1, shape.head_dim)
    rotated = split[:, : shape.num_heads + shape.num_kv_heads]
    cos, sin = (table[start + depths[:num_rows]][:, None] for table in rotation)
    rotated = rotated * cos + rotated.roll(shape.head_dim // 2, -1) * sin
    keys[:, start : start + num_rows] = rotated[:, shape.num_heads :].transpose(0, 1)
    values[:, start : start + num_rows] = split[:, rotated.shape[1] :].transpose(0, 1)
    return rotated[:, : shape.num_heads].contiguous()


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    ancestors: Tensor,
    shape: HeadShape,
    chip: Chip,
    span: int = 0,
) -> Tensor:
    num_rows, start = len(queries), int(position)
    before = torch.ones(num_rows, start, dtype=torch.bool, device=queries.device)
    visible = torch.cat([before, ancestors[:num_rows, :num_rows].bool()], dim=1)
    attended = scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[None, :, : start + num_rows],
        values[None, :, : start + num_rows],
        attn_mask=visible,
        enable_gqa=shape.group > 1,
    )
    return attended[0].transpose(0, 1).reshape(num_rows, -1)


def project(
    x: Tensor,
    weight: Tensor,
    chip: Chip,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    if norm is not None:
        x = rms_norm(x, x.shape[-1:], norm, eps)
    out = linear(x, weight)
    if gated:
        out = silu_times(out)
    return out if onto is None else onto.add_(out)


def project_four_bit(x: Tensor, weight: FourBitWeight, chip: Chip, **how: Any) -> Tensor:
    return project(x, weight.restore().to(x.dtype), chip, **how)


def silu_times(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up

"""The decoder's layers for single-precision steps on a CPU.

At a few rows the cost of a small model is the number of operations, not their size. So weights
are laid out anew, once: everything between two matrix products that a product can take over is
folded into it, and results go into buffers whose views are ready. The copy doubles the memory of
the layers' weights; models that run on a CPU are small.

With ``n(x) = x / hypot(|x|, sqrt(D·eps))``, RMSNorm is ``n(x)·sqrt(D)·w``: the factors enter the
projection behind it. Channels of queries and keys are reordered so that the two that rotate
together are neighbours: a rotation is then one complex multiplication, which also carries the
queries' ``1/sqrt(head_dim)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import silu

from xsd.pairs.cache import KVCache

KEPT_ROWS = 64
"""Buffers of passes up to this size are kept for the next pass of that size."""


Tap = Callable[[int, Tensor], None]
"""Number of a layer, from 1, and its output rows [B, R, D]."""


class FoldedLayers:
    """The layers of a ``LlamaModel`` in float32 on a CPU, with plain linears."""

    tap: Tap | None = None

    def __init__(self, model: Any) -> None:
        config = model.config
        self.shape = _Shape(
            num_heads=int(config.num_attention_heads),
            num_kv_heads=int(config.num_key_value_heads),
            head_dim=int(model.layers[0].self_attn.head_dim),
            width=int(config.hidden_size),
            ffn=int(config.intermediate_size),
        )
        with torch.no_grad():
            self.layers = [_Layer(layer, self.shape) for layer in model.layers]
            self.final_norm: Tensor = model.norm.weight * sqrt(self.shape.width)
            self.floor = torch.tensor(sqrt(self.shape.width * float(config.rms_norm_eps)))
        self._scratch: dict[tuple[int, int], _Scratch] = {}

    def set_rotation(
        self, cos: Float[Tensor, "positions half"], sin: Float[Tensor, "positions half"]
    ) -> None:
        self.turns = torch.complex(cos, sin)

    def run(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        batch, num_rows, width = x.shape
        scratch = self._buffers(batch, num_rows)
        scratch.set_turns(self.turns[cache.positions(num_rows)])
        bias, beta = self._bias(batch, num_rows, cache)
        rows = x.reshape(batch * num_rows, width)
        windows = cache.window(num_rows)
        for number, (layer, window) in enumerate(zip(self.layers, windows, strict=True), start=1):
            torch.mm(self._normed(rows, scratch), layer.qkv, out=scratch.qkv)
            torch.mul(scratch.pairs, scratch.turns, out=scratch.turned)
            window.new_keys.copy_(scratch.new_keys)
            window.new_values.copy_(scratch.new_values)
            if scratch.strided_queries is not None:
                scratch.queries.view_as(scratch.strided_queries).copy_(scratch.strided_queries)
            keys, values = window.keys.flatten(0, 1), window.values.flatten(0, 1)
            scores = torch.baddbmm(bias, scratch.queries, keys.transpose(1, 2), beta=beta)
            torch.bmm(torch.softmax(scores, -1), values, out=scratch.attended)
            if scratch.strided_merged is not None:
                scratch.strided_merged.copy_(scratch.by_head)
            rows = torch.addmm(rows, scratch.merged, layer.out)
            torch.mm(self._normed(rows, scratch), layer.gate_up, out=scratch.gate_up)
            rows = torch.addmm(rows, silu(scratch.gate).mul_(scratch.up), layer.down)
            if self.tap is not None:
                self.tap(number, rows.view(batch, num_rows, width))
        states = self._normed(rows, scratch) * self.final_norm
        return states.view(batch, num_rows, width)

    def _normed(self, rows: Tensor, scratch: _Scratch) -> Tensor:
        vector_norm(rows, dim=-1, keepdim=True, out=scratch.size)
        torch.hypot(scratch.size, self.floor, out=scratch.size)
        return torch.div(rows, scratch.size, out=scratch.normed)

    def _bias(self, batch: int, num_rows: int, cache: KVCache) -> tuple[Tensor, int]:
        """What is added to the scores, [B·kv_heads, group·R, end] or broadcast; and its factor."""
        visible = cache.visible(num_rows)
        if visible is None:
            return self.floor, 0
        bias = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        shape = self.shape
        if cache.pad is None:
            return bias.repeat(shape.group, 1), 1
        bias = bias[:, None, None].expand(-1, shape.num_kv_heads, shape.group, -1, -1)
        return bias.reshape(batch * shape.num_kv_heads, shape.group * num_rows, -1), 1

    def _buffers(self, batch: int, num_rows: int) -> _Scratch:
        key = batch, num_rows
        scratch = self._scratch.get(key)
        if scratch is None:
            scratch = _Scratch(batch, num_rows, self.shape)
            if batch * num_rows <= KEPT_ROWS:
                self._scratch[key] = scratch
        return scratch


@dataclass(frozen=True)
class _Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    width: int
    ffn: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads


class _Layer:
    """One layer's weights, [in, out] in memory: what ``mm`` reads fastest at few rows."""

    def __init__(self, layer: Any, shape: _Shape) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        norm_1, norm_2 = (norm.weight * sqrt(shape.width) for norm in norms)
        queries, keys = (
            _neighbours(linear.weight, shape.head_dim)
            for linear in (attention.q_proj, attention.k_proj)
        )
        self.qkv = _in_out(torch.cat([queries, keys, attention.v_proj.weight]) * norm_1)
        self.out = _in_out(attention.o_proj.weight)
        self.gate_up = _in_out(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * norm_2)
        self.down = _in_out(mlp.down_proj.weight)


class _Scratch:
    """Buffers of a pass of B x R rows, and every view of them that a layer needs.

    In ``qkv`` a row's heads are queries, keys, values; the values' turn is 1.
    """

    def __init__(self, batch: int, num_rows: int, shape: _Shape) -> None:
        rows = batch * num_rows
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        all_heads, group = heads + 2 * kv_heads, shape.group
        self.size = torch.empty(rows, 1)
        self.normed = torch.empty(rows, shape.width)
        self.qkv = torch.empty(rows, all_heads * head_dim)
        pairs = self.qkv.view(batch, num_rows, all_heads, head_dim // 2, 2)
        self.pairs = torch.view_as_complex(pairs)
        self.turns = torch.ones_like(self.pairs)
        self.query_scale = head_dim**-0.5

        self.turned = torch.empty_like(self.pairs)
        by_head = torch.view_as_real(self.turned).flatten(-2).transpose(1, 2)
        parts = by_head.split((heads, kv_heads, kv_heads), dim=1)
        self.query_turns, self.key_turns, _ = self.turns.split((heads, kv_heads, kv_heads), dim=2)
        queries, self.new_keys, self.new_values = parts

        # One batch entry a key head; its group's query heads are further rows.
        queries = queries.view(batch, kv_heads, group, num_rows, head_dim)
        self.queries = queries.reshape(batch * kv_heads, group * num_rows, head_dim)
        is_view = self.queries.data_ptr() == queries.data_ptr()
        self.strided_queries = None if is_view else queries

        self.attended = torch.empty(batch * kv_heads, group * num_rows, head_dim)
        self.by_head = self.attended.view(batch, kv_heads, group, num_rows, head_dim)
        self.merged = self.attended.view(rows, heads * head_dim)
        self.strided_merged: Tensor | None = None
        if num_rows > 1:
            self.merged = torch.empty(rows, heads * head_dim)
            merged = self.merged.view(batch, num_rows, kv_heads, group, head_dim)
            self.strided_merged = merged.permute(0, 2, 3, 1, 4)

        self.gate_up = torch.empty(rows, 2 * shape.ffn)
        self.gate, self.up = self.gate_up.view(rows, 2, shape.ffn).unbind(1)

    def set_turns(self, turns: Tensor) -> None:
        """``turns``: [R, half] or [B, R, half], of the rows' positions."""
        turns = turns.unsqueeze(-2)
        self.query_turns.copy_(turns * self.query_scale)
        self.key_turns.copy_(turns)


def _neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection, so that channels i and i + head_dim/2 of a head come in turn."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _in_out(weight: Tensor) -> Tensor:
    return weight.detach().t().contiguous()

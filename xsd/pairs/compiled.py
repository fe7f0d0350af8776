"""The decoder's layers for single-precision steps on a CPU: one compiled call a pass.

Weights are laid out anew, once, as the kernel reads them fastest, with the norms' factors in the
projections behind them. The copy doubles the memory of the layers' weights; models that run on a
CPU are small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xsd import kernels
from xsd.pairs.cache import KVCache

MAX_ROWS = 64
"""Passes of more rows are a library's: its products are made for them, and use all cores."""


class CompiledLayers:
    """The layers of a ``LlamaModel`` in float32 on a CPU, with plain linears."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.width = int(config.hidden_size)
        self.eps = np.float32(config.rms_norm_eps)
        parts = [_layer(layer) for layer in model.layers]
        self.weights = [kernels.pack(np.stack(weights)) for weights in zip(*parts, strict=True)]
        self.final_norm = model.norm.weight.detach().numpy()
        self._no_tree = np.zeros((0, 0), bool)

    def set_rotation(
        self, cos: Float[Tensor, "positions half"], sin: Float[Tensor, "positions half"]
    ) -> None:
        self.cos, self.sin = (x.contiguous().numpy() for x in (cos, sin))

    def run(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        batch, num_rows, width = x.shape
        states = np.empty((batch * num_rows, width), np.float32)
        at = cache.positions(num_rows)
        if isinstance(at, slice):
            positions = np.tile(np.arange(at.start, at.stop), batch)
        else:
            positions = at.numpy().reshape(-1)
        keys, values = cache.arrays
        hole_start, hole_end = 0, np.zeros(batch, np.int64)
        if cache.pad is not None:
            hole_start, hole_end = cache.pad_start, cache.pad.numpy() + cache.pad_start
        begin = np.full(batch, cache.length) if cache.ragged is None else np.array(cache.ragged)
        tree = self._no_tree if cache.tree is None else cache.tree.ancestors.numpy()
        kernels.decoder_pass(
            x.reshape(-1, width).contiguous().numpy(), *self.weights, self.final_norm, self.eps,
            self.cos, self.sin, keys, values, hole_start, hole_end, begin, positions, tree, states,
        )  # fmt: skip
        return torch.from_numpy(states).view(batch, num_rows, width)


def _layer(layer: Any) -> tuple[np.ndarray, ...]:
    """[in, out] in memory: queries, keys and values; attention out; gate and up; down."""
    attention, mlp = layer.self_attn, layer.mlp
    with torch.no_grad():
        qkv = torch.cat([x.weight for x in (attention.q_proj, attention.k_proj, attention.v_proj)])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        weights = (
            qkv * layer.input_layernorm.weight,
            attention.o_proj.weight,
            gate_up * layer.post_attention_layernorm.weight,
            mlp.down_proj.weight,
        )
        return tuple(weight.t().numpy() for weight in weights)

"""The decoder's layers for single-precision steps on a CPU: one compiled call a pass.

Weights are laid out anew, once, as the kernel reads them fastest, with the norms' factors in the
projections behind them. The copy doubles the memory of the layers' weights; models that run on a
CPU are small.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd import kernels
from xsd.pairs.cache import KVCache

CHUNK_ROWS = 24
"""Longer passes go through in parts of so many rows, which a core's caches hold."""


class CompiledLayers:
    """The layers of a ``LlamaModel`` in float32 on a CPU, with plain linears."""

    num_cores: int | None = None
    """For passes of many rows; None: as many as PyTorch has threads."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.width = int(config.hidden_size)
        self.eps = np.float32(config.rms_norm_eps)
        parts = [_layer(layer) for layer in model.layers]
        self.weights = [kernels.pack(np.stack(weights)) for weights in zip(*parts, strict=True)]
        self.final_norm = model.norm.weight.detach().numpy()
        self._no_tree, self._no_norm = np.zeros((0, 0), bool), np.zeros(0, np.float32)
        self._cores: list[ThreadPoolExecutor] = []

    def set_rotation(
        self, cos: Float[Tensor, "positions half"], sin: Float[Tensor, "positions half"]
    ) -> None:
        self.cos, self.sin = (x.contiguous().numpy() for x in (cos, sin))

    def run(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        batch, num_rows, _ = x.shape
        found = cache.positions(num_rows)
        if isinstance(found, slice):
            positions = np.arange(found.start, found.stop)
        else:
            positions = found.numpy()
        positions = np.broadcast_to(positions, (batch, num_rows))
        begin = np.full(batch, cache.length) if cache.ragged is None else np.array(cache.ragged)
        rows = x.contiguous().numpy()
        # The rows of a tree look at each other.
        size = num_rows if cache.tree is not None else max(1, CHUNK_ROWS // batch)
        chunks = [
            _Rows(
                np.ascontiguousarray(rows[:, c : c + size]), begin + c, positions[:, c : c + size]
            )
            for c in range(0, num_rows, size)
        ]
        if len(chunks) == 1:
            states = self._layers(slice(None), cache, chunks[0]).states
        else:
            parts = [done.states for done in self._pipeline(cache, chunks)]
            states = np.concatenate(parts, axis=1)
        return torch.from_numpy(states)

    def _pipeline(self, cache: KVCache, chunks: list[_Rows]) -> Iterable[_Rows]:
        """Every core has some of the layers, and a chunk goes from one to the next.

        A layer sees the chunks in order, as it must: each attends to those before it.
        """
        num_layers = len(self.weights[0])
        num_stages = min(self.num_cores or torch.get_num_threads(), num_layers)
        bounds = [num_layers * i // num_stages for i in range(num_stages + 1)]
        stages = [slice(*ends) for ends in pairwise(bounds)]
        while len(self._cores) < num_stages - 1:
            self._cores.append(ThreadPoolExecutor(1, "xsd-layers"))
        waiting: list[Future[_Rows]] = []
        for chunk in chunks:
            before: Future[_Rows] | _Rows = chunk
            for stage, core in zip(stages[:-1], self._cores, strict=False):
                before = core.submit(self._after, before, stage, cache)
            if isinstance(before, Future):
                waiting.append(before)
        for before in waiting or chunks:
            yield self._after(before, stages[-1], cache)

    def _after(self, before: Future[_Rows] | _Rows, stage: slice, cache: KVCache) -> _Rows:
        rows = before.result() if isinstance(before, Future) else before
        return self._layers(stage, cache, rows)

    def _layers(self, layers: slice, cache: KVCache, rows: _Rows) -> _Rows:
        batch, num_rows, width = rows.states.shape
        keys, values = cache.arrays
        hole_start, hole_end = 0, np.zeros(batch, np.int64)
        if cache.pad is not None:
            hole_start, hole_end = cache.pad_start, cache.pad.numpy() + cache.pad_start
        is_last = layers.stop in (None, len(self.weights[0]))
        states = np.empty((batch * num_rows, width), np.float32)
        kernels.decoder_pass(
            rows.states.reshape(-1, width), *(weight[layers] for weight in self.weights),
            self.final_norm if is_last else self._no_norm, self.eps, self.cos, self.sin,
            keys[layers], values[layers], hole_start, hole_end, rows.begin,
            rows.positions.reshape(-1),
            self._no_tree if cache.tree is None else cache.tree.ancestors.numpy(), states,
        )  # fmt: skip
        return replace(rows, states=states.reshape(batch, num_rows, width))


@dataclass(frozen=True, slots=True)
class _Rows:
    """A part of a pass on its way through the layers."""

    states: Float[np.ndarray, "B R D"]
    begin: Int[np.ndarray, " B"]
    """Columns of the first rows."""
    positions: Int[np.ndarray, "B R"]


def _layer(layer: Any) -> tuple[np.ndarray, ...]:
    """[in, out] in memory: queries, keys and values; attention out; gate and up; down."""
    attention, mlp = layer.self_attn, layer.mlp
    with torch.no_grad():
        queries = attention.q_proj.weight.double() * attention.head_dim**-0.5
        qkv = torch.cat([queries.float(), attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        weights = (
            qkv * layer.input_layernorm.weight,
            attention.o_proj.weight,
            gate_up * layer.post_attention_layernorm.weight,
            mlp.down_proj.weight,
        )
        return tuple(weight.t().numpy() for weight in weights)

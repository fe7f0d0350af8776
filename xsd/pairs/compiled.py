"""The decoder's layers for single-precision steps on a CPU: one compiled call a pass.

Weights are laid out anew, once, as the kernel reads them fastest, with the norms' factors in the
projections behind them. The copy doubles the memory of the layers' weights; models that run on a
CPU are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xsd import kernels
from xsd.pairs.cache import KVCache

CHUNK_ROWS = 24
"""Longer passes go through in parts of so many rows, which a core's caches hold."""

_CHAIN, _NO_NORM = np.zeros((0, 0), bool), np.zeros(0, np.float32)


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
        self._cores: list[ThreadPoolExecutor] = []

    def set_rotation(
        self, cos: Float[Tensor, "positions half"], sin: Float[Tensor, "positions half"]
    ) -> None:
        self.rotation = [x.contiguous().numpy() for x in (cos, sin)]

    def takes(self, num_rows: int, cache: KVCache) -> bool:
        """So many tokens of one answer can be ``read``."""
        return cache.batch == 1 and (num_rows <= CHUNK_ROWS or cache.tree is not None)

    def read(
        self,
        ids: Sequence[int] | Int[Tensor, " R"],
        table: Float[np.ndarray, "V D"],
        lm_head: np.ndarray,
        num_ids: int,
        cache: KVCache,
    ) -> tuple[Float[Tensor, "R D"], Int[np.ndarray, " R"]]:
        """Tokens behind the cache, in one call: states after the final norm, likeliest tokens.

        Args:
            table: embeddings.
            lm_head: packed.
            num_ids: choose among the first so many.

        Raises:
            AssertionError: the rows do not fit, or a token has no embedding.
        """
        num_rows = len(ids)
        cache.check_room(num_rows)
        states = np.empty((num_rows, self.width), np.float32)
        chosen = np.empty(num_rows, np.int64)
        are_known = kernels.read_pass(
            np.asarray(ids), table, lm_head, num_ids, *self.weights, self.final_norm,
            self.eps, *self.rotation, *cache.arrays, *_where(cache, num_rows), states, chosen,
        )  # fmt: skip
        assert are_known, f"one of the tokens {ids} is none of {len(table)}"
        cache.length += num_rows
        return torch.from_numpy(states), chosen

    def run(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        batch, num_rows, width = x.shape
        rows, where = x.contiguous().numpy(), _where(cache, num_rows)
        # The rows of a tree look at each other.
        size = num_rows if cache.tree is not None else max(1, CHUNK_ROWS // batch)
        if num_rows <= size:
            done = self._layers(slice(None), cache, _Rows(rows.reshape(-1, width), where))
            return torch.from_numpy(done.states).view(x.shape)
        chunks = [
            _Rows(rows[:, c : c + size].reshape(-1, width), where.part(c, size, batch))
            for c in range(0, num_rows, size)
        ]
        parts = [done.states.reshape(batch, -1, width) for done in self._pipeline(cache, chunks)]
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def arguments(self, cache: KVCache) -> tuple[Any, ...]:
        """Of ``kernels.decoder_pass``, from weights to cache: for kernels that call it."""
        return (*self.weights, self.final_norm, self.eps, *self.rotation, *cache.arrays)

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
        keys, values = cache.arrays
        is_last = layers.stop in (None, len(self.weights[0]))
        states = np.empty(rows.states.shape, np.float32)
        kernels.decoder_pass(
            rows.states, *(weight[layers] for weight in self.weights),
            self.final_norm if is_last else _NO_NORM, self.eps, *self.rotation,
            keys[layers], values[layers], *rows.where, states,
        )  # fmt: skip
        return _Rows(states, rows.where)


class _Where(NamedTuple):
    """What a kernel is told of the places of some rows."""

    hole_start: int
    hole_end: Int[np.ndarray, " B"]
    begin: Int[np.ndarray, " B"]
    """Columns of the first rows."""
    positions: Int[np.ndarray, " BxR"]
    ancestors: Bool[np.ndarray, "R R"]

    def part(self, start: int, size: int, batch: int) -> _Where:
        """Of ``size`` rows from ``start`` on, of each answer."""
        positions = self.positions.reshape(batch, -1)[:, start : start + size].reshape(-1)
        return self._replace(begin=self.begin + start, positions=positions)


class _Rows(NamedTuple):
    """A part of a pass on its way through the layers."""

    states: Float[np.ndarray, "BxR D"]
    where: _Where


def _where(cache: KVCache, num_rows: int) -> _Where:
    batch, length = cache.batch, cache.length
    begin = np.array([length] * batch if cache.ragged is None else cache.ragged)
    found = cache.positions(num_rows)
    if isinstance(found, slice):
        positions = np.arange(found.start, found.stop)
    else:
        positions = found.numpy().reshape(-1)
    if len(positions) < batch * num_rows:
        positions = np.tile(positions, batch)
    hole_start, hole_end = 0, np.zeros(batch, np.int64)
    if cache.pad is not None:
        hole_start, hole_end = cache.pad_start, cache.pad.numpy() + cache.pad_start
    ancestors = _CHAIN if cache.tree is None else cache.tree.ancestors.numpy()
    return _Where(hole_start, hole_end, begin, positions, ancestors)


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

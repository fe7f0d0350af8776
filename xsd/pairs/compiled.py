"""The decoder's layers for single-precision steps on a CPU: one compiled call a pass.

Weights are laid out anew, once, as the kernel reads them fastest, with the norms' factors in the
projections behind them. The copy doubles the memory of the layers' weights; models that run on a
CPU are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from xsd import kernels
from xsd.pairs.cache import KVCache

CHUNK_ROWS = 24
"""Longer passes go through in parts of so many rows, which a core's caches hold."""

_CHAIN = np.zeros((0, 0), bool)


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

    def run(
        self, x: Float[Tensor, "B R D"], cache: KVCache, num_states: int | None = None
    ) -> Float[Tensor, "B n D"]:
        """R rows behind the cache; states of each answer's last ``num_states`` (None: of all)."""
        batch, num_rows, width = x.shape
        num_states = num_rows if num_states is None else num_states
        rows, where = x.contiguous().numpy(), _where(cache, num_rows)
        # The rows of a tree look at each other.
        if cache.tree is not None or batch * num_rows <= CHUNK_ROWS:
            states = np.empty((batch * num_rows, width), np.float32)
            kernels.decoder_pass(rows.reshape(-1, width), *self.arguments(cache), *where, states)
            return torch.from_numpy(states).view(x.shape)[:, num_rows - num_states :]
        num_cores = self.num_cores or torch.get_num_threads()
        bounds = _chunks(num_rows, max(1, CHUNK_ROWS // batch), num_cores)
        wanted = int(np.searchsorted(bounds, num_rows - num_states, "right")) - 1
        mixed = _by_chunk(rows, bounds)
        positions = _by_chunk(where.positions.reshape(batch, num_rows), bounds)
        self._share_out(
            min(num_cores, len(bounds) - 1), bounds, len(bounds) - 1 - wanted, mixed,
            *self.arguments(cache), where.hole_start, where.hole_end, where.begin, positions,
        )  # fmt: skip
        parts = [
            mixed[batch * lo : batch * hi].reshape(batch, hi - lo, width)
            for lo, hi in pairwise(bounds[wanted:].tolist())
        ]
        read = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
        return read[:, read.shape[1] - num_states :]

    def arguments(self, cache: KVCache) -> tuple[Any, ...]:
        """Of ``kernels.decoder_pass``, from weights to cache: for kernels that call it."""
        return (*self.weights, self.final_norm, self.eps, *self.rotation, *cache.arrays)

    def _share_out(
        self, num_cores: int, bounds: Int[np.ndarray, " ends"], num_read: int, *rest: Any
    ) -> None:
        """One call of ``kernels.share_of_pass`` a core."""
        placed = np.zeros(len(bounds) - 1, np.int64)

        def share(core: int) -> None:
            try:
                kernels.share_of_pass(core, num_cores, bounds, num_read, placed, *rest)
            except BaseException:
                placed[:] = kernels.ABANDONED
                raise

        while len(self._cores) < num_cores - 1:
            self._cores.append(ThreadPoolExecutor(1, "xsd-layers"))
        others = [
            core.submit(share, number)
            for number, core in enumerate(self._cores[: num_cores - 1], start=1)
        ]
        share(0)
        # The first core has seen the others' numbers; to wait for their threads takes longer.
        if (placed == kernels.ABANDONED).any():
            for other in others:
                other.result()


class _Where(NamedTuple):
    """What a kernel is told of the places of some rows."""

    hole_start: int
    hole_end: Int[np.ndarray, " B"]
    begin: Int[np.ndarray, " B"]
    """Columns of the first rows."""
    positions: Int[np.ndarray, " BxR"]
    ancestors: Bool[np.ndarray, "R R"]


def _chunks(num_rows: int, size: int, num_cores: int) -> Int[np.ndarray, " ends"]:
    """Ends of parts of ``size`` rows or a little less, as many for every core."""
    num_chunks = -(-num_rows // (size * num_cores)) * num_cores
    return np.arange(num_chunks + 1) * num_rows // num_chunks


def _by_chunk(
    rows: Shaped[np.ndarray, "B R *rest"], bounds: Int[np.ndarray, " ends"]
) -> Shaped[np.ndarray, " BxR *rest"]:
    """Chunk after chunk, each of all answers: a copy."""
    rest = rows.shape[2:]
    parts = [rows[:, lo:hi].reshape(-1, *rest) for lo, hi in pairwise(bounds.tolist())]
    return np.concatenate(parts)


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

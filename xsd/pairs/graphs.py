"""The decoder's layers on a GPU: short passes are captured once and replayed.

At a few rows a GPU computes faster than a host can launch. So passes of up to ``MAX_ROWS`` rows
over one row of a batch run as CUDA graphs, one a cache and row count, over buffers that stay where
they are; what changes from pass to pass (ids or rows, the cache's length, the tree) is written
into them, and nothing waits for the device. Everything else runs as ``ModuleLayers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from xsd.pairs.cache import KVCache
from xsd.pairs.device import to_device
from xsd.pairs.folded import Tap
from xsd.pairs.kernels import attend, rotate_and_append, silu_times
from xsd.pairs.modules import HeadShape, Layer, ModuleLayers

MAX_ROWS = 64
"""Longer passes are prefills."""

T = TypeVar("T")
Begin = Callable[[Tensor], Tensor]
"""What a pass is given, to its first layer's rows [R, D]."""
Finish = Callable[[Tensor], T]
"""Final-norm states [R, D] to what a pass is for."""


class Capture(Generic[T]):
    """Work on fixed buffers, launched as one CUDA graph; ``result`` is overwritten every time."""

    def __init__(self, work: Callable[[], T], lane: Lane) -> None:
        """``work`` runs once here, so that what its first run allocates and compiles exists."""
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(lane.device)
        lane.stream.wait_stream(current)
        with torch.cuda.stream(lane.stream):
            work()
            lane.stream.synchronize()
            # Other threads may go on allocating.
            self._graph.capture_begin(pool=lane.pool, capture_error_mode="thread_local")
            try:
                self.result = work()
            finally:
                self._graph.capture_end()
        current.wait_stream(lane.stream)

    def replay(self) -> T:
        self._graph.replay()
        return self.result


class Lane:
    """Where captures that never run at once are made: they share their scratch memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class _Pass(Generic[T]):
    given: Tensor
    replay: Callable[[], T]


class GraphedLayers:
    """The layers of a ``LlamaModel`` on a CUDA device, in half or single precision."""

    def __init__(self, model: Any) -> None:
        self.eager = ModuleLayers(model)
        device = self.eager.final_norm.device
        self.row_sizes: Sequence[int] = ()
        """Entry r - 1: how many rows a pass of r rows runs with; none: as many as it has."""
        self._lane = Lane(device)
        self._shape = HeadShape(
            self.eager.num_heads,
            self.eager.num_kv_heads,
            int(model.layers[0].self_attn.head_dim),
            torch.cuda.get_device_properties(device).multi_processor_count,
        )
        self._width = int(model.config.hidden_size)
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        self._chain_depths = torch.arange(MAX_ROWS, dtype=torch.int32, device=device)
        self._chain_ancestors = torch.ones(
            MAX_ROWS, MAX_ROWS, dtype=torch.uint8, device=device
        ).tril()
        self._depths, self._ancestors = self._chain_depths.clone(), self._chain_ancestors.clone()
        self._holds_tree = False
        self._passes: WeakKeyDictionary[KVCache, dict[object, _Pass[Any]]] = WeakKeyDictionary()

    @property
    def tap(self) -> Tap | None:
        return self.eager.tap

    @tap.setter
    def tap(self, tap: Tap | None) -> None:
        self.eager.tap = tap

    def set_rotation(
        self, cos: Float[Tensor, "positions half"], sin: Float[Tensor, "positions half"]
    ) -> None:
        self.eager.set_rotation(cos, sin)
        # They read the tables that these replace.
        self._passes.clear()

    def takes(self, num_rows: int, cache: KVCache) -> bool:
        """Whether such a pass is captured."""
        plain = cache.batch == 1 and cache.pad is None and self.tap is None
        return plain and 0 < num_rows <= MAX_ROWS

    def run(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        if not self.takes(x.shape[1], cache):
            return self.eager.run(x, cache)
        # A caller may keep the states; the next pass overwrites what a capture returns.
        return self.replay("states", x[0], cache, _as_is, _as_is)[None, : x.shape[1]].clone()

    def replay(
        self,
        kind: str,
        given: Float[Tensor, "R D"] | Int[Tensor, " R"],
        cache: KVCache,
        begin: Begin,
        finish: Finish[T],
    ) -> T:
        """One pass, behind ``cache.length``, which the caller moves.

        Args:
            kind: names ``begin`` and ``finish``; a kind is captured once a cache and row count.

        Returns:
            What ``finish`` returned, of as many rows as the pass ran with; the next pass of the
            kind overwrites it.
        """
        num_rows = given.shape[0]
        size = self._size(num_rows, cache)
        end = cache.length + size
        assert end <= cache.max_length, f"cache of {cache.max_length} positions, {end} needed"
        self._place(cache, num_rows)
        found = self._passes.setdefault(cache, {}).get((kind, size))
        if found is None:
            buffer = given.new_zeros(size, *given.shape[1:])
            buffer[:num_rows] = given
            # The cache keeps the pass, so the pass must not keep the cache.
            layers = [(cache.keys[n, 0], cache.values[n, 0]) for n in range(len(cache.keys))]
            work = lambda: finish(self._layers(begin(buffer), layers))  # noqa: E731
            found = _Pass(buffer, Capture(work, self._lane).replay)
            self._passes[cache][kind, size] = found
        else:
            found.given[:num_rows].copy_(given, non_blocking=True)
        result: T = found.replay()
        return result

    def _size(self, num_rows: int, cache: KVCache) -> int:
        size = self.row_sizes[num_rows - 1] if num_rows <= len(self.row_sizes) else num_rows
        return size if cache.length + size <= cache.max_length else num_rows

    def _place(self, cache: KVCache, num_rows: int) -> None:
        """Write where the pass begins and how its rows branch; rows that pad it follow all."""
        self._position.fill_(cache.length)
        if cache.tree is None and not self._holds_tree:
            return
        self._depths.copy_(self._chain_depths)
        self._ancestors.copy_(self._chain_ancestors)
        self._holds_tree = cache.tree is not None
        if cache.tree is not None:
            self._depths[:num_rows].copy_(cache.tree.depths)
            self._ancestors[:num_rows, :num_rows].copy_(cache.tree.ancestors)

    def _layers(
        self, rows: Float[Tensor, "R D"], buffers: Sequence[tuple[Tensor, Tensor]]
    ) -> Float[Tensor, "R D"]:
        """All layers and the final norm; reads no number from the device, waits for nothing."""
        eager, shape, width = self.eager, self._shape, (self._width,)
        x = rows.clone()
        for layer, (keys, values) in zip(eager.layers, buffers, strict=True):
            normed = functional.rms_norm(x, width, layer.norm_1, eager.eps)
            queries = rotate_and_append(
                layer.project_qkv(normed),
                (eager.cos, eager.sin),
                self._position,
                self._depths,
                keys,
                values,
                shape,
            )
            attended = attend(queries, keys, values, self._position, self._ancestors, shape)
            Layer.add(layer.out, attended, x)
            normed = functional.rms_norm(x, width, layer.norm_2, eager.eps)
            Layer.add(layer.down, silu_times(layer.project_gate_up(normed)), x)
        return functional.rms_norm(x, width, eager.final_norm, eager.eps)


def _as_is(rows: Tensor) -> Tensor:
    return rows

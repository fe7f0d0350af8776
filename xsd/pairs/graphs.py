"""The decoder's layers on a GPU: short passes are captured once and replayed.

At a few rows a GPU computes faster than a host launches. So passes of up to ``MAX_ROWS`` rows
over one row of a batch run as CUDA graphs, one a cache and row count, over buffers that stay where
they are; what changes from pass to pass (ids or rows, the cache's length, the tree) is written
into them, and nothing waits for the device. A prefill that
comes again with as many rows is captured too: hundreds of launches would keep the interpreter from
whoever drafts beside it. Everything else runs as ``ModuleLayers``.
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
from xsd.pairs.capture import Capture, Lane
from xsd.pairs.four_bit import FourBitWeight
from xsd.pairs.four_bit_kernels import project_four_bit
from xsd.pairs.gpu_kernels import attend, project, rotate_and_append, silu_times
from xsd.pairs.launch import Chip, HeadShape
from xsd.pairs.modules import Layer, ModuleLayers, Products, Tap

MAX_ROWS = 64
"""Longer passes are prefills."""
MAX_PREFILL, MAX_PREFILLS = 4096, 32
"""Rows of prompts whose prefill is captured when their length comes again, and lengths a cache."""
FUSED = (torch.bfloat16, torch.float16)
"""Precisions in which norms, gates and sums are part of the products that they stand beside."""

T = TypeVar("T")
Begin = Callable[[Tensor], Tensor]
"""What a pass is given, to its first layer's rows [R, D]."""
Finish = Callable[[Tensor], T]
"""Final-norm states [R, D] to what a pass is for."""


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
        self._chip = Chip.of(device)
        head_dim = int(model.layers[0].self_attn.head_dim)
        self._shape = HeadShape(self.eager.num_heads, self.eager.num_kv_heads, head_dim)
        self._weights: list[Products | None] = [None] * len(self.eager.layers)
        if self.eager.final_norm.dtype in FUSED:
            self._weights = [Products.of(layer) for layer in self.eager.layers]
        self._width = int(model.config.hidden_size)
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        self._chain_depths = torch.arange(MAX_ROWS, dtype=torch.int32, device=device)
        self._chain_ancestors = torch.ones(
            MAX_ROWS, MAX_ROWS, dtype=torch.uint8, device=device
        ).tril()
        self._depths, self._ancestors = self._chain_depths.clone(), self._chain_ancestors.clone()
        self._holds_tree = False
        self._prefills: WeakKeyDictionary[KVCache, dict[int, _Pass[Tensor] | None]] = (
            WeakKeyDictionary()
        )
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
        self._prefills.clear()

    def takes(self, num_rows: int, cache: KVCache) -> bool:
        """Whether such a pass is captured."""
        plain = cache.batch == 1 and cache.pad is None and self.tap is None
        return plain and 0 < num_rows <= MAX_ROWS

    def run(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        if self._begins(x, cache):
            return self._prefill(x, cache)
        if not self.takes(x.shape[1], cache):
            return self.eager.run(x, cache)
        # A caller may keep the states; the next pass overwrites what a capture returns.
        return self.replay("states", x[0], cache, _as_is, _as_is)[None, : x.shape[1]].clone()

    def _begins(self, x: Float[Tensor, "B R D"], cache: KVCache) -> bool:
        """Whether it is a prefill as it has come before, and worth a capture."""
        plain = cache.batch == 1 and cache.pad is None and self.tap is None
        if not plain or cache.length or not MAX_ROWS < x.shape[1] <= MAX_PREFILL:
            return False
        passes = self._prefills.setdefault(cache, {})
        if x.shape[1] in passes:
            return True
        # Once is no reason to keep a capture.
        if len(passes) < MAX_PREFILLS:
            passes[x.shape[1]] = None
        return False

    def _prefill(self, x: Float[Tensor, "1 R D"], cache: KVCache) -> Float[Tensor, "1 R D"]:
        passes = self._prefills[cache]
        found = passes[x.shape[1]]
        if found is None:
            buffer, rows = x.clone(), cache.first_rows(1)
            found = _Pass(buffer, Capture(lambda: self.eager.run(buffer, rows), self._lane).replay)
            passes[x.shape[1]] = found
        found.given.copy_(x)
        return found.replay().clone()

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
        # Over whole buffers attention sums in one order, wherever the rows stand.
        span = cache.max_length if cache.whole else 0
        found = self._passes.setdefault(cache, {}).get((kind, size, span))
        if found is None:
            buffer = given.new_zeros(size, *given.shape[1:])
            buffer[:num_rows] = given
            # The cache keeps the pass, so the pass must not keep the cache.
            layers = [(cache.keys[n, 0], cache.values[n, 0]) for n in range(len(cache.keys))]

            def work() -> T:
                return finish(self._layers(begin(buffer), layers, span))

            found = _Pass(buffer, Capture(work, self._lane).replay)
            self._passes[cache][kind, size, span] = found
        else:
            found.given[:num_rows].copy_(given, non_blocking=True)
        result: T = found.replay()
        return result

    def append(
        self, x: Float[Tensor, "R D"], cache: KVCache, at: Int[Tensor, " 1"]
    ) -> Float[Tensor, "R D"]:
        """A pass that is part of somebody's capture: behind so many positions as ``at`` says when
        it is replayed. The caller sees to it that they fit."""
        assert self.takes(x.shape[0], cache) and not self._holds_tree, "captures append chains"
        self._position.copy_(at)
        layers = [(cache.keys[n, 0], cache.values[n, 0]) for n in range(len(cache.keys))]
        return self._layers(x, layers, 0)

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
        self,
        rows: Float[Tensor, "R D"],
        buffers: Sequence[tuple[Tensor, Tensor]],
        span: int,
    ) -> Float[Tensor, "R D"]:
        """All layers and the final norm; reads no number from the device, waits for nothing."""
        eager = self.eager
        x = rows.clone()
        for layer, weights, (keys, values) in zip(
            eager.layers, self._weights, buffers, strict=True
        ):
            queries = rotate_and_append(
                self._normed_qkv(x, layer, weights),
                (eager.cos, eager.sin),
                self._position,
                self._depths,
                keys,
                values,
                self._shape,
            )
            attended = attend(
                queries,
                keys,
                values,
                self._position,
                self._ancestors,
                self._shape,
                self._chip,
                span,
            )
            self._add_rest(x, attended, layer, weights)
        return self._norm(x, eager.final_norm)

    def _normed_qkv(
        self, x: Float[Tensor, "R D"], layer: Layer, weights: Products | None
    ) -> Float[Tensor, "R qkv"]:
        if weights is None:
            return layer.project_qkv(self._norm(x, layer.norm_1))
        return self._project(x, weights.qkv, norm=layer.norm_1, eps=self.eager.eps)

    def _add_rest(
        self,
        x: Float[Tensor, "R D"],
        attended: Float[Tensor, "R width"],
        layer: Layer,
        weights: Products | None,
    ) -> None:
        """Add attention's output, then the feed-forward block's, to ``x``."""
        if weights is None:
            Layer.add(layer.out, attended, x)
            gate_up = layer.project_gate_up(self._norm(x, layer.norm_2))
            Layer.add(layer.down, silu_times(gate_up), x)
            return
        self._project(attended, weights.out, onto=x)
        inner = self._project(x, weights.gate_up, norm=layer.norm_2, eps=self.eager.eps, gated=True)
        self._project(inner, weights.down, onto=x)

    def _project(
        self, x: Float[Tensor, "R _"], weight: Tensor | FourBitWeight, **how: Any
    ) -> Float[Tensor, "R _"]:
        if isinstance(weight, FourBitWeight):
            return project_four_bit(x, weight, self._chip, **how)
        return project(x, weight, self._chip, **how)

    def _norm(self, x: Float[Tensor, "R D"], weight: Tensor) -> Float[Tensor, "R D"]:
        return functional.rms_norm(x, (self._width,), weight, self.eager.eps)


def _as_is(rows: Tensor) -> Tensor:
    return rows

"""One pass of a Llama decoder over new rows, on a cache that we own.

The weights stay transformers' modules'; the loop over layers is ours, because at one row a
library's general path costs several times what the arithmetic does. Equality with the modules'
own forward is a test.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.kernels import PANEL
from xsd.pairs.cache import KVCache
from xsd.pairs.compiled import CompiledLayers
from xsd.pairs.modules import ModuleLayers, Tap
from xsd.pairs.modules import is_plain as _is_plain

if TYPE_CHECKING:
    from xsd.pairs.graphs import GraphedLayers

COMPILED_BYTES = 1 << 28
"""Larger decoder layers are run as they are: their passes wait for memory, not for Python."""

GRAPHED = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions that the kernels of captured passes know."""


class DecoderStack:
    """Cached forward of a ``LlamaModel``: rows in, final-norm states out.

    A stack serves one thread at a time.
    """

    def __init__(self, model: Any) -> None:
        """``model``: a transformers ``LlamaModel`` in eval mode, on its final device."""
        config = model.config
        assert config.hidden_act == "silu", f"activation {config.hidden_act}, silu is supported"
        self.num_layers = int(config.num_hidden_layers)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(model.layers[0].self_attn.head_dim)
        self.width = int(config.hidden_size)
        self.device: torch.device = model.norm.weight.device
        self.dtype: torch.dtype = model.norm.weight.dtype
        self._rotary = model.rotary_emb
        on_cpu = self.device.type == "cpu" and self.dtype == torch.float32
        # Compiled passes keep a copy of the weights: nothing for models that fill a machine.
        is_small = sum(weight.nbytes for weight in model.layers.parameters()) <= COMPILED_BYTES
        is_plain = all(
            _is_plain(linear)
            for layer in model.layers
            for linear in (*layer.self_attn.children(), *layer.mlp.children())
            if linear is not layer.mlp.act_fn
        )
        self.compiled = CompiledLayers(model) if on_cpu and is_small and is_plain else None
        self._layers = self._lay_out(model)
        self.graphs: GraphedLayers | None = None
        """The layers where they replay captured passes; None: they do not."""
        if not isinstance(self._layers, ModuleLayers):
            self.graphs = self._layers
        self.max_positions = int(config.max_position_embeddings)
        self._extend(self.max_positions)

    @property
    def tap(self) -> Tap | None:
        """Is shown every layer's output rows, before the final norm; None: nobody looks."""
        return self._layers.tap

    @tap.setter
    def tap(self, tap: Tap | None) -> None:
        self._layers.tap = tap

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        if max_length > self._num_positions:
            self._extend(max_length)
        return KVCache(
            self.num_layers,
            batch,
            self.num_kv_heads,
            max_length,
            self.head_dim,
            device=self.device,
            dtype=self.dtype,
            slack=PANEL if self.compiled is not None else None,
        )

    @torch.inference_mode()
    def forward(
        self, x: Float[Tensor, "B R D"], cache: KVCache, num_states: int | None = None
    ) -> Float[Tensor, "B n D"]:
        """Run R new rows behind what ``cache`` holds; append them; return final-norm states.

        Args:
            num_states: of each answer's last so many rows; None: of all.

        Raises:
            AssertionError: the rows do not fit into the cache.
        """
        num_rows = x.shape[1]
        cache.check_room(num_rows)
        if self.compiled is None or self.tap is not None:
            states = self._layers.run(x, cache)
            states = states if num_states is None else states[:, num_rows - num_states :]
        else:
            states = self.compiled.run(x, cache, num_states)
        cache.length += num_rows
        return states

    def forward_at(
        self, x: Float[Tensor, "1 R D"], cache: KVCache, at: Int[Tensor, " 1"]
    ) -> Float[Tensor, "1 R D"]:
        """A few rows behind the position that ``at`` holds on the device, so that a captured graph
        may hold the pass. The cache's own length means nothing afterwards."""
        if self.graphs is not None:
            return self.graphs.append(x[0], cache, at)[None]
        cache.length = int(at)
        return self.forward(x, cache)

    def _lay_out(self, model: Any) -> ModuleLayers | GraphedLayers:
        # Triton comes with torch wherever it can run.
        if self.device.type == "cuda" and self.dtype in GRAPHED and find_spec("triton"):
            from xsd.pairs.graphs import GraphedLayers

            return GraphedLayers(model)
        return ModuleLayers(model)

    def _extend(self, num_positions: int) -> None:
        """Give the layers the rotary angles of that many positions."""
        self._num_positions = num_positions
        positions = torch.arange(num_positions, device=self.device).float()
        angles = torch.outer(positions, self._rotary.inv_freq.float().to(self.device))
        scaling = float(getattr(self._rotary, "attention_scaling", 1.0))
        rotation = angles.cos() * scaling, angles.sin() * scaling
        self._layers.set_rotation(*rotation)
        if self.compiled is not None:
            self.compiled.set_rotation(*rotation)

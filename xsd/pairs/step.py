"""One pass of a Llama decoder over new rows, on a cache that we own.

The weights stay transformers' modules'; the loop over layers is ours, because at one row a
library's general path costs several times what the arithmetic does. Equality with the modules'
own forward is a test.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.pairs.cache import KVCache
from xsd.pairs.folded import FoldedLayers, Tap
from xsd.pairs.modules import ModuleLayers, is_plain

if TYPE_CHECKING:
    from xsd.pairs.graphs import GraphedLayers

FOLDED_BYTES = 1 << 30
"""Larger decoder layers are run as they are."""
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
        # Folding keeps a copy of the layers: nothing for models that fill a machine.
        is_small = sum(weight.nbytes for weight in model.layers.parameters()) <= FOLDED_BYTES
        self._folds = (
            on_cpu
            and is_small
            and all(
                is_plain(linear)
                for layer in model.layers
                for linear in (*layer.self_attn.children(), *layer.mlp.children())
                if linear is not layer.mlp.act_fn
            )
        )
        self._layers = self._lay_out(model)
        self.graphs: GraphedLayers | None = None
        """The layers where they replay captured passes; None: they do not."""
        if not isinstance(self._layers, FoldedLayers | ModuleLayers):
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
            keys_by_channel=self._folds,
        )

    @torch.inference_mode()
    def forward(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        """Run R new rows behind what ``cache`` holds; append them; return final-norm states.

        Raises:
            AssertionError: the rows do not fit into the cache.
        """
        states = self._layers.run(x, cache)
        cache.length += x.shape[1]
        return states

    def _lay_out(self, model: Any) -> FoldedLayers | ModuleLayers | GraphedLayers:
        if self._folds:
            return FoldedLayers(model)
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
        self._layers.set_rotation(angles.cos() * scaling, angles.sin() * scaling)

"""One pass of a Llama decoder over new rows, on a cache that we own.

The weights stay transformers' modules'; the loop over layers is ours, because at one row a
library's general path costs several times what the arithmetic does. Equality with the modules'
own forward is a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from xsd.kernels import PANEL
from xsd.pairs.cache import KVCache, LayerWindow
from xsd.pairs.compiled import MAX_ROWS, CompiledLayers

COMPILED_BYTES = 1 << 28
"""Larger decoder layers are run as they are: their passes wait for memory, not for Python."""

Tap = Callable[[int, Tensor], None]
"""Number of a layer, from 1, and its output rows [B, R, D]."""


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
        self._layers = ModuleLayers(model)
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
    def forward(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        """Run R new rows behind what ``cache`` holds; append them; return final-norm states.

        Raises:
            AssertionError: the rows do not fit into the cache.
        """
        batch, num_rows, _ = x.shape
        cache.check_room(num_rows)
        few = self.compiled is not None and self.tap is None
        few = few and (batch * num_rows <= MAX_ROWS or cache.ragged is not None)
        states = (self.compiled if few else self._layers).run(x, cache)  # type: ignore[union-attr]
        cache.length += num_rows
        return states

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


class ModuleLayers:
    """The decoder's layers on any device, in any precision, quantised or not."""

    tap: Tap | None = None

    def __init__(self, model: Any) -> None:
        config = model.config
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.eps = float(config.rms_norm_eps)
        self.layers = [_Layer(layer) for layer in model.layers]
        self.final_norm = model.norm.weight.detach()

    def set_rotation(
        self, cos: Float[Tensor, "positions half"], sin: Float[Tensor, "positions half"]
    ) -> None:
        # The sign of "rotate half" is folded into the sine, so a rotation is one roll and two
        # multiplications.
        dtype = self.final_norm.dtype
        self.cos = torch.cat([cos, cos], dim=-1).to(dtype)
        self.sin = torch.cat([-sin, sin], dim=-1).to(dtype)

    def run(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        batch, num_rows, width = x.shape
        positions = cache.positions(num_rows)
        heads_axis = (slice(None), None) if cache.pad is not None else ()
        rotation = self.cos[positions][heads_axis], self.sin[positions][heads_axis]
        # A kernel's own causal mask is right, and fastest, where nothing precedes the rows.
        causal = cache.pad is None and cache.length == 0 and num_rows > 1
        mask = None if causal else cache.visible(num_rows)
        if cache.pad is not None and mask is not None:
            mask = mask[:, None]
        for number, (layer, window) in enumerate(
            zip(self.layers, cache.window(num_rows), strict=True), start=1
        ):
            normed = functional.rms_norm(x, (width,), layer.norm_1, self.eps)
            queries = self._append(layer.project_qkv(normed), rotation, window)
            attended = functional.scaled_dot_product_attention(
                queries,
                window.keys,
                window.values,
                attn_mask=mask,
                is_causal=causal,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )
            x = x + layer.out(attended.transpose(1, 2).reshape(batch, num_rows, -1))
            normed = functional.rms_norm(x, (width,), layer.norm_2, self.eps)
            gate, up = layer.project_gate_up(normed).chunk(2, dim=-1)
            x = x + layer.down(functional.silu(gate) * up)
            if self.tap is not None:
                self.tap(number, x)
        return functional.rms_norm(x, (width,), self.final_norm, self.eps)

    def _append(
        self,
        qkv: Float[Tensor, "B R qkv"],
        rotation: tuple[Tensor, Tensor],
        window: LayerWindow,
    ) -> Float[Tensor, "B heads R head_dim"]:
        """Rotate queries and keys, put keys and values into the cache, return the queries."""
        batch, num_rows, _ = qkv.shape
        num_rotated = self.num_heads + self.num_kv_heads
        split = qkv.view(batch, num_rows, num_rotated + self.num_kv_heads, -1).transpose(1, 2)
        rotated, values = split[:, :num_rotated], split[:, num_rotated:]
        cos, sin = rotation
        rotated = rotated * cos + rotated.roll(cos.shape[-1] // 2, -1) * sin
        window.new_keys.copy_(rotated[:, self.num_heads :])
        window.new_values.copy_(values)
        return rotated[:, : self.num_heads]


class _Layer:
    """The tensors of one decoder layer, gathered so that a step touches few modules."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv_modules = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.gate_up_modules = [mlp.gate_proj, mlp.up_proj]
        self.qkv = _fuse(self.qkv_modules)
        self.gate_up = _fuse(self.gate_up_modules)
        self.out = attention.o_proj
        self.down = mlp.down_proj
        self.norm_1 = layer.input_layernorm.weight.detach()
        self.norm_2 = layer.post_attention_layernorm.weight.detach()

    def project_qkv(self, x: Tensor) -> Tensor:
        if self.qkv is not None:
            return functional.linear(x, self.qkv)
        return torch.cat([module(x) for module in self.qkv_modules], dim=-1)

    def project_gate_up(self, x: Tensor) -> Tensor:
        if self.gate_up is not None:
            return functional.linear(x, self.gate_up)
        return torch.cat([module(x) for module in self.gate_up_modules], dim=-1)


def _is_plain(linear: Any) -> bool:
    return type(linear) is nn.Linear and linear.bias is None


def _fuse(linears: list[Any]) -> Tensor | None:
    """Stack plain linears into one weight and make the modules views of it (no second copy)."""
    if not all(map(_is_plain, linears)):
        return None
    weight = torch.cat([linear.weight.detach() for linear in linears])
    parts = weight.split([linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return weight

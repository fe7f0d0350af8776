"""The decoder's layers as transformers' modules hold them: any device, any precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from xsd.pairs.cache import KVCache, LayerWindow
from xsd.pairs.four_bit import FourBitWeight

Tap = Callable[[int, Tensor], None]
"""Number of a layer, from 1, and its output rows [B, R, D]."""


class ModuleLayers:
    """The decoder's layers on any device, in any precision, quantised or not."""

    tap: Tap | None = None

    def __init__(self, model: Any) -> None:
        config = model.config
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.eps = float(config.rms_norm_eps)
        self.layers = [Layer(layer) for layer in model.layers]
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


class Layer:
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

    @staticmethod
    def add(linear: Any, x: Float[Tensor, "R in"], onto: Float[Tensor, "R out"]) -> None:
        """``onto += linear(x)``, as one operation where the linear is a plain one."""
        if is_plain(linear):
            onto.addmm_(x, linear.weight.t())
        else:
            onto.add_(linear(x))


@dataclass(frozen=True)
class Products:
    """A layer's products, as kernels that fold in what stands beside them take them."""

    qkv: Tensor | FourBitWeight
    out: Tensor | FourBitWeight
    gate_up: Tensor | FourBitWeight
    down: Tensor | FourBitWeight

    @classmethod
    def of(cls, layer: Layer) -> Products | None:
        """None: they are of another kind."""
        if layer.qkv is not None and layer.gate_up is not None:
            if not (is_plain(layer.out) and is_plain(layer.down)):
                return None
            return cls(layer.qkv, layer.out.weight, layer.gate_up, layer.down.weight)
        groups = (layer.qkv_modules, [layer.out], layer.gate_up_modules, [layer.down])
        found = [FourBitWeight.of(modules) for modules in groups]
        known = [weight for weight in found if weight is not None]
        return cls(*known) if len(known) == len(found) else None


def is_plain(linear: Any) -> bool:
    return type(linear) is nn.Linear and linear.bias is None


def _fuse(linears: list[Any]) -> Tensor | None:
    """Stack plain linears into one weight and make the modules views of it (no second copy)."""
    if not all(map(is_plain, linears)):
        return None
    weight = torch.cat([linear.weight.detach() for linear in linears])
    parts = weight.split([linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return weight

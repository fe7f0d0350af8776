"""One pass of a Llama decoder over new rows, on a cache that we own.

The weights stay transformers' modules'; the loop over layers is ours, because at one row a
library's general path costs several times what the arithmetic does. Equality with the modules'
own forward is a test.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xsd.pairs.cache import KVCache


def _fuse(linears: list[nn.Module]) -> Tensor | None:
    """Stack plain linears into one weight and make the modules views of it (no second copy)."""
    if not all(type(linear) is nn.Linear and linear.bias is None for linear in linears):
        return None
    weight = torch.cat([linear.weight.detach() for linear in linears])  # type: ignore[misc]
    start = 0
    for linear in linears:
        rows = linear.weight.shape[0]  # type: ignore[union-attr]
        linear.weight = nn.Parameter(weight[start : start + rows], requires_grad=False)
        start += rows  # type: ignore[operator]
    return weight


class _Layer:
    """The tensors of one decoder layer, gathered so that a step touches no module."""

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
            return F.linear(x, self.qkv)
        return torch.cat([module(x) for module in self.qkv_modules], dim=-1)

    def project_gate_up(self, x: Tensor) -> Tensor:
        if self.gate_up is not None:
            return F.linear(x, self.gate_up)
        return torch.cat([module(x) for module in self.gate_up_modules], dim=-1)


class DecoderStack:
    """Cached forward of a ``LlamaModel``: rows in, final-norm states out."""

    def __init__(self, model: Any) -> None:
        """``model``: a transformers ``LlamaModel`` in eval mode, on its final device."""
        config = model.config
        self.num_layers = int(config.num_hidden_layers)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.eps = float(config.rms_norm_eps)
        self.max_positions = int(config.max_position_embeddings)
        self.layers = [_Layer(layer) for layer in model.layers]
        self.final_norm = model.norm.weight.detach()
        self.width = int(config.hidden_size)
        self.device: torch.device = self.final_norm.device
        self.dtype: torch.dtype = self.final_norm.dtype
        inv_freq = model.rotary_emb.inv_freq.float().to(self.device)
        angles = torch.outer(torch.arange(self.max_positions, device=self.device).float(), inv_freq)
        angles = torch.cat([angles, angles], dim=-1)
        scaling = float(getattr(model.rotary_emb, "attention_scaling", 1.0))
        self.cos = (angles.cos() * scaling).to(self.dtype)
        # The sign of "rotate half" is folded into the sine, so a rotation is one roll and two
        # multiplications.
        sin = angles.sin() * scaling
        half = self.head_dim // 2
        sin[:, :half].neg_()
        self.sin = sin.to(self.dtype)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        return KVCache(
            self.num_layers,
            batch,
            self.num_kv_heads,
            max_length,
            self.head_dim,
            device=self.device,
            dtype=self.dtype,
        )

    @torch.inference_mode()
    def forward(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        """Run R new rows behind what ``cache`` holds; append them; return final-norm states.

        Raises:
            AssertionError: the rows do not fit into the cache.
        """
        batch, rows, width = x.shape
        start, end = cache.length, cache.length + rows
        assert end <= cache.max_length, f"cache of {cache.max_length} positions, {end} needed"
        cos, sin = self._rotation(cache, start, end)
        mask = self._mask(cache, start, end)
        causal = mask is None and rows > 1
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, self.head_dim
        half = dim // 2
        for index, layer in enumerate(self.layers):
            normed = F.rms_norm(x, (width,), layer.norm_1, self.eps)
            qkv = layer.project_qkv(normed).view(batch, rows, heads + 2 * kv_heads, dim)
            qkv = qkv.transpose(1, 2)
            rotated = qkv[:, : heads + kv_heads]
            rotated = rotated * cos + rotated.roll(half, -1) * sin
            keys, values = cache.append(index, rotated[:, heads:], qkv[:, heads + kv_heads :])
            attended = F.scaled_dot_product_attention(
                rotated[:, :heads],
                keys,
                values,
                attn_mask=mask,
                is_causal=causal,
                enable_gqa=heads != kv_heads,
            )
            x = x + layer.out(attended.transpose(1, 2).reshape(batch, rows, heads * dim))
            normed = F.rms_norm(x, (width,), layer.norm_2, self.eps)
            gate, up = layer.project_gate_up(normed).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        cache.advance(rows)
        return F.rms_norm(x, (width,), self.final_norm, self.eps)

    def _rotation(self, cache: KVCache, start: int, end: int) -> tuple[Tensor, Tensor]:
        if cache.pad is None:
            return self.cos[start:end], self.sin[start:end]
        positions: Int[Tensor, "B R"]
        positions = torch.arange(start, end, device=self.device)[None] - cache.pad[:, None]
        positions = positions.clamp(min=0)
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def _mask(self, cache: KVCache, start: int, end: int) -> Tensor | None:
        """None where the kernel's own causal mask, or no mask at all, is right."""
        if cache.pad is None and (start == 0 or end - start == 1):
            return None
        columns = torch.arange(end, device=self.device)
        mask = columns <= torch.arange(start, end, device=self.device)[:, None]
        if cache.pad is None:
            return mask
        # A row of padding sees itself: a softmax over nothing would be NaN.
        visible = columns >= cache.pad[:, None]
        own = columns == torch.arange(start, end, device=self.device)[:, None]
        return ((mask & visible[:, None]) | own)[:, None]

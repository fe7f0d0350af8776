"""The one transformer block of all attentive levels: pre-LN attention, optional cross, FFN."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout

from xsd.adapters.cache import Past
from xsd.errors import XsdError


class Block(nn.Module):
    """``x + attention(LN x)``, ``+ cross(LN x, memory)`` where there is a memory, ``+ ffn(LN x)``.

    Who sees whom is the caller's affair (``Past``): the same weights and the same code serve the
    parallel pass, the unrolled chain and the cached step.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        *,
        activation: nn.Module,
        cross: bool,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise XsdError(f"num_heads={num_heads} does not divide the width {width}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.cross = Cross(width, num_heads) if cross else None
        self.norm_ffn = nn.LayerNorm(width)
        self.up = nn.Linear(width, ffn_dim)
        self.activation = activation
        self.down = nn.Linear(ffn_dim, width)

    def run(self, x: Float[Tensor, "B R D"], past: Past, layer: int) -> Float[Tensor, "B R D"]:
        qkv = _split(self._read(x), 3, self.num_heads)
        attended = past.attend(layer, qkv, self.dropout if self.training else 0.0)
        x = self._write(x, _merge(attended))
        if self.cross is not None:
            x = x + self._drop(self.cross.run(x, past, layer))
        return self._feed_forward(x)

    def compile_rows(self) -> None:
        """Let ``torch.compile`` fuse what is done row by row; who sees whom stays as it is."""
        for name in ("_read", "_write", "_feed_forward"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True))

    def _read(self, x: Float[Tensor, "B R D"]) -> Float[Tensor, "B R threeD"]:
        projected: Tensor = self.query_key_value(self.norm_attention(x))
        return projected

    def _write(
        self, x: Float[Tensor, "B R D"], attended: Float[Tensor, "B R D"]
    ) -> Float[Tensor, "B R D"]:
        return x + self._drop(self.attention_out(attended))

    def _feed_forward(self, x: Float[Tensor, "B R D"]) -> Float[Tensor, "B R D"]:
        hidden = self._drop(self.activation(self.up(self.norm_ffn(x))))
        return x + self._drop(self.down(hidden))

    def project_memory(self, memory: Float[Tensor, "B K D"]) -> Float[Tensor, "2 B H K Dh"]:
        """Keys and values of the cross-attention."""
        assert self.cross is not None, "this block has no cross-attention"
        return self.cross.project_memory(memory)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout) if self.training else x


class Cross(nn.Module):
    """Pre-LN cross-attention with its own projections; its output starts at zero."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.norm_memory = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def project_memory(self, memory: Float[Tensor, "B K D"]) -> Float[Tensor, "2 B H K Dh"]:
        return _split(self.key_value(self.norm_memory(memory)), 2, self.num_heads)

    def run(self, x: Float[Tensor, "B R D"], past: Past, layer: int) -> Float[Tensor, "B R D"]:
        query = _split(self.query(self.norm(x)), 1, self.num_heads).select(0, 0)
        projected: Tensor = self.out(_merge(past.recall(layer, query)))
        return projected


def _split(x: Tensor, num_parts: int, num_heads: int) -> Tensor:
    """[B,R,parts*H*Dh] -> [parts,B,H,R,Dh]"""
    batch, rows, width = x.shape
    parts = x.view(batch, rows, num_parts, num_heads, width // (num_parts * num_heads))
    return parts.permute(2, 0, 3, 1, 4)


def _merge(x: Tensor) -> Tensor:
    """[B,H,R,Dh] -> [B,R,H*Dh]"""
    return torch.flatten(x.transpose(1, 2), 2)

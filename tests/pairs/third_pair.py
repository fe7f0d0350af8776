"""A pair of another architecture and other widths: what docs/pairs.md walks through.

A GPT-2 in small: learned positions, LayerNorm with bias, GELU, biased projections. What it sees are
the means of picture tiles. Weights are random; nothing is trained or downloaded.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tests.pairs.tokenizers import llama_like
from xsd.pairs.base import Decoder, Media, PairSpec, Prompt, Source
from xsd.pairs.cache import KVCache
from xsd.pairs.config import PairConfig
from xsd.pairs.processing import prompt_around

HEADS, LENGTH, TILES = 2, 256, 4
TOKENIZER = llama_like()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )


class Stack(nn.Module):
    """The cached language model: the four attributes and two methods of ``base.Stack``."""

    device, dtype, max_positions = torch.device("cpu"), torch.float32, LENGTH

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.width = width
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(width)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        size = (len(self.blocks), batch, HEADS, max_length, self.width // HEADS)
        return KVCache(*size, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def forward(self, x: Float[Tensor, "B R D"], cache: KVCache) -> Float[Tensor, "B R D"]:
        batch, rows, width = x.shape
        # The cache says where the rows stand and what they see; batches may be padded in front.
        x = x + self.positions.weight[cache.positions(rows)]
        sees = cache.visible(rows)
        if sees is not None and sees.ndim == 3:
            sees = sees[:, None]
        for block, window in zip(self.blocks, cache.window(rows), strict=True):
            heads = block.qkv(block.norms[0](x)).view(batch, rows, 3, HEADS, -1)
            queries, keys, values = heads.permute(2, 0, 3, 1, 4)
            window.new_keys.copy_(keys)
            window.new_values.copy_(values)
            mixed = functional.scaled_dot_product_attention(
                queries, window.keys, window.values, attn_mask=sees
            )
            x = x + block.out(mixed.transpose(1, 2).reshape(batch, rows, width))
            x = x + block.mlp(block.norms[1](x))
        cache.length += rows
        states: Tensor = self.norm(x)
        return states


class TileDecoder(Decoder):
    """Sees pictures as tiles; ``role`` says which half of the media, and how it is prompted."""

    def __init__(self, role: str, width: int, num_layers: int) -> None:
        torch.manual_seed(len(role))
        self.role = role
        self.eye = nn.Linear(3 * TILES * TILES, width).requires_grad_(False)
        head = nn.Linear(width, len(TOKENIZER), bias=False).requires_grad_(False)
        embedding = torch.randn(len(TOKENIZER), width)
        stack = Stack(width, num_layers).requires_grad_(False).eval()
        super().__init__(stack, embedding, head, TOKENIZER, frozenset(range(60, 70)))

    def prompt(self, question: str) -> Prompt:
        return prompt_around(self.tokenizer, f"{self.role}: ", f" {question}")

    def pixels(self, media: Media) -> Float[Tensor, "N 3 H W"]:
        images = media.event_images if self.role == "events" else list(media.frames)
        tiles = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images]
        return torch.stack([functional.adaptive_avg_pool2d(x, TILES) for x in tiles])

    @torch.inference_mode()
    def visual_tokens(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "visual D"]:
        tokens: Tensor = self.eye(pixels.flatten(1))
        return tokens


def sources(config: PairConfig) -> dict[str, Source]:
    return {role: Source(f"third {role}", "random") for role in ("drafter", "verifier")}


def drafter(config: PairConfig, quant: str) -> TileDecoder:
    return TileDecoder("events", 20, 1)


def verifier(config: PairConfig, quant: str) -> TileDecoder:
    return TileDecoder("video", 28, 3)


PAIR = PairSpec("fp32", sources, drafter, verifier, num_frames=8)

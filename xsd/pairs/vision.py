"""The CLIP tower that both models share: hidden states of one layer, and no work beyond it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from xsd import kernels
from xsd.pairs.crew import Crew
from xsd.pairs.folded import affine, stack

COMPILED_BYTES = 1 << 28
"""Larger towers are run as they are: the compiled pass keeps a copy of the weights."""

Features = Callable[[Float[Tensor, "N 3 H W"]], Float[Tensor, "N tokens width"]]
Projection = Callable[[Float[Tensor, "N tokens width"]], Float[Tensor, "N tokens D"]]

_ACTIVATIONS = {"gelu": 0, "silu": 1, "swish": 1, "quick_gelu": 2}
"""By the kernel's numbers."""


def clip_features(
    tower: Any, pixels: Float[Tensor, "N 3 H W"], layer: int
) -> Float[Tensor, "N tokens width"]:
    """``hidden_states[layer]`` of a transformers ``CLIPVisionModel``, CLS included, no post-norm.

    Layers above ``layer`` (-1 is the last one's output, -2 the one's before it) are not run.
    """
    hidden: Tensor = tower.pre_layrnorm(tower.embeddings(pixels))
    for block in tower.encoder.layers[: _num_run(tower, layer)]:
        hidden = block(hidden, None)
    return hidden


def _num_run(tower: Any, layer: int) -> int:
    return layer % (len(tower.encoder.layers) + 1)


def features_of(tower: Any, layer: int, crew: Crew | None = None) -> Features:
    """``clip_features`` of one tower and layer, compiled where that can be."""
    if _num_run(tower, layer) and CompiledTower.takes(tower):
        return CompiledTower(tower, layer, crew)
    return partial(clip_features, tower, layer=layer)


class CompiledTower:
    """``clip_features`` in single precision on a CPU. Weights are copied."""

    @staticmethod
    def takes(tower: Any) -> bool:
        """It is small, on a CPU in single precision, and nothing but CLIP."""
        weights = [*tower.parameters()]
        return (
            {(w.device.type, w.dtype) for w in weights} == {("cpu", torch.float32)}
            and sum(w.nbytes for w in weights) <= COMPILED_BYTES
            and tower.config.hidden_act in _ACTIVATIONS
            and all(
                type(linear) is nn.Linear
                for block in tower.encoder.layers
                for linear in (*block.self_attn.children(), block.mlp.fc1, block.mlp.fc2)
            )
        )

    @torch.no_grad()
    def __init__(self, tower: Any, layer: int, crew: Crew | None = None) -> None:
        """``layer``: as ``clip_features`` takes it; at least one layer is run. ``crew``: shares out
        the images."""
        config, begin, norm = tower.config, tower.embeddings, tower.pre_layrnorm
        self.size = int(config.image_size)
        blocks = tower.encoder.layers[: _num_run(tower, layer)]
        begun = begin.position_embedding.weight.clone()
        begun[0] += begin.class_embedding
        self._begin = (
            int(config.patch_size),
            kernels.pack(begin.patch_embedding.weight.flatten(1).t().numpy()),
            begun.numpy(),
            torch.stack([norm.weight, norm.bias]).numpy(),
        )
        self._shape = begun.shape
        self.crew = crew or Crew()
        stacks = [stack([*parts]) for parts in zip(*map(_block, blocks), strict=True)]
        weights, biases = zip(*stacks, strict=True)
        activation = _ACTIVATIONS[config.hidden_act]
        eps = np.float32(config.layer_norm_eps)
        self._rest = *weights, *biases, eps, activation, int(config.num_attention_heads)

    def __call__(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N tokens width"]:
        assert pixels.shape[2:] == (self.size, self.size), f"images of {self.size} pixels expected"
        images = pixels.contiguous().numpy()
        features = np.empty((len(images), *self._shape), np.float32)

        def encode(share: slice) -> None:
            kernels.encode_images(images[share], *self._begin, *self._rest, features[share])

        self.crew.share_out(len(images), encode)
        return torch.from_numpy(features)


def _block(block: Any) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Queries, keys and values; attention out; up; down: weights [in, out] and biases."""
    attention, mlp = block.self_attn, block.mlp
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    width = attention.q_proj.in_features
    qkv = nn.Linear(width, 3 * width, device="meta")
    qkv.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
    qkv.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
    return (
        affine(qkv, block.layer_norm1, width, attention.scale),
        affine(attention.out_proj),
        affine(mlp.fc1, block.layer_norm2),
        affine(mlp.fc2),
    )


class CompiledProjector:
    """Features to embeddings, row by row: an affine map, an activation, another map; on a CPU."""

    @staticmethod
    def takes(first: Any, activation: str, second: Any) -> bool:
        return activation in _ACTIVATIONS and all(
            type(linear) is nn.Linear
            and linear.bias is not None
            and (linear.weight.device.type, linear.weight.dtype) == ("cpu", torch.float32)
            for linear in (first, second)
        )

    @torch.no_grad()
    def __init__(self, first: nn.Linear, activation: str, second: nn.Linear, crew: Crew) -> None:
        self._maps = *stack([affine(first)]), *stack([affine(second)])
        self._activation, self._width = _ACTIVATIONS[activation], second.out_features
        self._crew = crew

    def __call__(self, features: Float[Tensor, "N tokens width"]) -> Float[Tensor, "N tokens D"]:
        given = features.contiguous().numpy()
        num_images, num_tokens, width = given.shape
        rows = given.reshape(-1, width)
        out = np.empty((len(rows), self._width), np.float32)

        def work(share: slice) -> None:
            kernels.project(rows[share], *self._maps, self._activation, out[share])

        self._crew.share_out(len(rows), work)
        return torch.from_numpy(out).view(num_images, num_tokens, -1)

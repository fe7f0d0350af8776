"""The CLIP tower that both models share: hidden states of one layer, and no work beyond it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor


def clip_features(
    tower: Any, pixels: Float[Tensor, "N 3 H W"], layer: int
) -> Float[Tensor, "N tokens width"]:
    """``hidden_states[layer]`` of a transformers ``CLIPVisionModel``, CLS included, no post-norm.

    Layers above ``layer`` (-1 is the last one's output, -2 the one's before it) are not run.
    """
    num_layers = len(tower.encoder.layers)
    hidden: Tensor = tower.pre_layrnorm(tower.embeddings(pixels))
    for block in tower.encoder.layers[: layer % (num_layers + 1)]:
        hidden = block(hidden, None)
    return hidden

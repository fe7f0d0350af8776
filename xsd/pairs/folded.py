"""Weights as compiled passes take them: norms folded into what follows, in panels."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from xsd import kernels

Matrix = Float[np.ndarray, "in out"]
Bias = Float[np.ndarray, " out"]


def fold(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"],
    norm: nn.LayerNorm | None = None,
    queries: int = 0,
    scale: float = 1.0,
) -> tuple[Matrix, Bias]:
    """``norm(x) @ weight.T + bias`` of a row that is normalised, but by no factors.

    ``scale`` goes into the first outputs, ``queries`` of them.
    """
    weight, bias = weight.t().double(), bias.double()
    if norm is not None:
        bias = bias + norm.bias.double() @ weight
        weight = norm.weight.double()[:, None] * weight
    scales = torch.ones_like(bias)
    scales[:queries] = scale
    return (weight * scales).float().numpy(), (bias * scales).float().numpy()


def affine(
    linear: nn.Linear, norm: nn.LayerNorm | None = None, queries: int = 0, scale: float = 1.0
) -> tuple[Matrix, Bias]:
    return fold(linear.weight, linear.bias, norm, queries, scale)


def stack(parts: list[tuple[Matrix, Bias]]) -> tuple[np.ndarray, np.ndarray]:
    """Packed weights of all layers, and biases as wide as they."""
    weights, biases = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    packed = kernels.pack(weights)
    wide = np.zeros((len(parts), packed.shape[1] * kernels.PANEL), np.float32)
    wide[:, : biases.shape[1]] = biases
    return packed, wide

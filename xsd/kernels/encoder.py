"""Images through a CLIP encoder."""

from __future__ import annotations

import numpy as np

from xsd.kernels import PANEL
from xsd.kernels.attention import attend, place
from xsd.kernels.head import add_to_all, affine, centre_all
from xsd.kernels.options import exact, inner
from xsd.kernels.products import NARROW, add_product
from xsd.kernels.rows import ONE, gelu, swish

QUICK = np.float32(1.702)
"""The slope of CLIP's own approximation of GELU."""


@exact
def encode_images(
    pixels, patch_size, patches, begun, entrance, qkv, attention_out, up, down,
    qkv_bias, attention_out_bias, up_bias, down_bias, eps, activation, num_heads, features,
):  # fmt: skip
    """N images to the hidden states behind the last of L layers, without a norm after it.

    Weights are packed; those behind a norm hold its factors, those of queries also
    ``1 / sqrt(Dh)``. Biases are as wide as the panels they belong to.

    Args:
        pixels: [N, C, H, W].
        patches: [P, C patch_size^2, 64].
        begun: [T, D]: class and position embeddings, one patch a row behind the class's.
        entrance: [2, D]: factors and bias of the norm before the first layer.
        qkv: [L, P, D, 64]; attention_out: the same; up: for F columns; down: [L, P, F, 64].
        eps: float32, of all norms.
        activation: 0: GELU; 1: SiLU; 2: ``x * sigmoid(1.702 x)``.
        features: [N, T, D], overwritten.
    """
    num_tokens, width = begun.shape
    head_dim = width // num_heads
    columns = num_tokens + PANEL
    cut = np.empty((num_tokens, patches.shape[1]), np.float32)
    x = np.empty((num_tokens, attention_out.shape[1] * PANEL), np.float32)
    normed = np.empty((num_tokens, width), np.float32)
    projected = np.empty((num_tokens, qkv.shape[1] * PANEL), np.float32)
    attended = np.zeros((num_tokens, width + NARROW), np.float32)
    hidden = np.empty((num_tokens, up.shape[1] * PANEL), np.float32)
    scores = np.empty((num_tokens, columns + PANEL), np.float32)
    factors = np.empty(num_tokens, np.float32)
    keys = np.zeros((num_heads, head_dim, columns), np.float32)
    values = np.zeros((num_heads, columns, head_dim), np.float32)
    everything = np.zeros((num_tokens, 0), np.bool_)
    for n in range(pixels.shape[0]):
        _cut(pixels[n], patch_size, cut)
        _begin(cut, patches, begun, entrance, eps, x, normed)
        _encode(
            qkv, attention_out, up, down, qkv_bias, attention_out_bias, up_bias, down_bias, eps,
            activation, x, normed, projected, attended, hidden, scores, factors, keys, values,
            everything,
        )  # fmt: skip
        features[n] = x[:, :width]


@exact
def project(rows, up, up_bias, down, down_bias, activation, out):
    """Two affine maps and what is between them.

    Args:
        rows: [R, D].
        up: [1, P, D, 64] for F columns; down: [1, P, F, 64]; biases as wide as the panels.
        activation: as ``encode_images`` takes it.
        out: [R, E], overwritten.
    """
    num_rows = rows.shape[0]
    hidden = np.empty((num_rows, up.shape[1] * PANEL), np.float32)
    projected = np.empty((num_rows, down.shape[1] * PANEL), np.float32)
    affine(rows, up[0], up_bias[0], hidden)
    _activate(hidden, down.shape[2], activation)
    affine(hidden, down[0], down_bias[0], projected)
    out[:] = projected[:, : out.shape[1]]


@inner
def _activate(hidden, width, activation):
    for t in range(hidden.shape[0]):
        if activation == 0:
            gelu(hidden[t, :width])
        else:
            swish(hidden[t, :width], ONE if activation == 1 else QUICK)


@inner
def _cut(image, size, cut):
    """A patch a row, the class's row zero."""
    num_channels, _, width = image.shape
    across = width // size
    cut[0] = 0.0
    for patch in range(cut.shape[0] - 1):
        row, top, left = cut[1 + patch], patch // across * size, patch % across * size
        for c in range(num_channels):
            for y in range(size):
                line, start = image[c, top + y], (c * size + y) * size
                for i in range(size):
                    row[start + i] = line[left + i]


@inner
def _begin(cut, patches, begun, entrance, eps, x, normed):
    width = begun.shape[1]
    for t in range(x.shape[0]):
        for j in range(width):
            x[t, j] = begun[t, j]
        x[t, width:] = 0.0
    add_product(cut, patches, x)
    centre_all(x, width, eps, normed)
    for t in range(x.shape[0]):
        for j in range(width):
            x[t, j] = normed[t, j] * entrance[0, j] + entrance[1, j]


@inner
def _encode(
    qkv, attention_out, up, down, qkv_bias, attention_out_bias, up_bias, down_bias, eps,
    activation, x, normed, projected, attended, hidden, scores, factors, keys, values, everything,
):  # fmt: skip
    num_heads, head_dim, _ = keys.shape
    num_tokens, width = normed.shape
    ffn = down.shape[2]
    for layer in range(qkv.shape[0]):
        centre_all(x, width, eps, normed)
        affine(normed, qkv[layer], qkv_bias[layer], projected)
        for h in range(num_heads):
            start = width + h * head_dim
            place(projected, start, start + width, 0, num_tokens, keys[h], values[h], 0)
            attend(
                projected, h * head_dim, 0, num_tokens, keys[h], values[h], 0, 0, num_tokens,
                everything, scores, factors, attended, h * head_dim,
            )  # fmt: skip
        add_to_all(x, attention_out_bias[layer])
        add_product(attended, attention_out[layer], x)
        centre_all(x, width, eps, normed)
        affine(normed, up[layer], up_bias[layer], hidden)
        _activate(hidden, ffn, activation)
        add_to_all(x, down_bias[layer])
        add_product(hidden, down[layer], x)

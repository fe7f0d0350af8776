"""A step of a drafting head: transformer blocks with biases between two projections."""

from __future__ import annotations

import numpy as np

from xsd.kernels import PANEL
from xsd.kernels.attention import attend, place
from xsd.kernels.options import exact, inner
from xsd.kernels.products import NARROW, add_product
from xsd.kernels.rows import ONE, add, centre, copy, gelu, swish


@inner
def affine(x, panels, bias, out):
    """``out = x @ w + bias``."""
    for r in range(out.shape[0]):
        copy(bias, out[r])
    add_product(x, panels, out)


@inner
def add_to_all(x, bias):
    for r in range(x.shape[0]):
        add(bias, x[r])


@inner
def centre_all(x, width, eps, out):
    for r in range(x.shape[0]):
        centre(x[r, :width], eps, out[r])


@exact
def head_pass(
    known, states, entrance, qkv, attention_out, query, cross_out, up, down, project,
    qkv_bias, attention_out_bias, query_bias, cross_out_bias, up_bias, down_bias, project_bias,
    eps, is_gelu, kept, keys, values, memory_keys, memory_values, memory_size, column, begin,
    ancestors, out,
):  # fmt: skip
    """R rows of each of B answers through a head of L blocks, behind what its cache holds.

    Weights are packed; those behind a norm hold its factors, those of queries also
    ``1 / sqrt(Dh)``. Biases are as wide as the panels they belong to.

    Args:
        known: [B R, D]: what is known of a row before its state: token, position, biases.
        states: [B R, D], not yet normalised.
        entrance: [P, D, 64], from normalised states.
        qkv: [L, P, D, 64]; attention_out, query, cross_out: the same; up: for F columns; down:
            [L, P, F, 64].
        project: [P, D, 64].
        eps: float32, of all norms.
        is_gelu: the activation is GELU, else SiLU.
        kept: float32, how much of ``states`` is in the output.
        keys: [L, B, H, Dh, columns], at least 64 more columns than are in use; written.
        values: [L, B, H, columns, Dh]; written.
        memory_keys: [L, B or 1, H, Dh, >= K + 64]; one may serve all answers.
        memory_values: [L, B or 1, H, >= K + 1, Dh].
        memory_size: K; 0: the blocks do not look at a memory; -1: it grows with the rows, and one
            at column c sees the first c + 2 of it.
        column: [B] int64: of the first row.
        begin: [B] int64: all rows see the columns before it.
        ancestors: [R, n] bool: which columns from ``begin`` on each row sees; of no rows: the rows
            are a chain, and ``begin`` is ``column``.
        out: [B R, D], overwritten; of a chain's rows, for one answer, it may be the last ones only.
    """
    num_rows, width = known.shape
    room = max(keys.shape[4], memory_keys.shape[4]) + PANEL
    x = np.zeros((num_rows, project.shape[0] * PANEL), np.float32)
    normed = np.empty((num_rows, width), np.float32)
    projected = np.empty((num_rows, qkv.shape[1] * PANEL), np.float32)
    asked = np.empty((num_rows, query.shape[1] * PANEL), np.float32)
    attended = np.zeros((num_rows, width + NARROW), np.float32)
    hidden = np.empty((num_rows, up.shape[1] * PANEL), np.float32)
    scores = np.empty((num_rows, room), np.float32)
    factors = np.empty(num_rows, np.float32)
    everything = np.zeros((num_rows // keys.shape[1], 0), np.bool_)
    no_rows = np.zeros((0, 0), np.bool_)
    _blocks(
        known, states, entrance, qkv, attention_out, query, cross_out, up, down, project,
        qkv_bias, attention_out_bias, query_bias, cross_out_bias, up_bias, down_bias, project_bias,
        eps, is_gelu, kept, keys, values, memory_keys, memory_values, memory_size, column, begin,
        ancestors, x, normed, projected, asked, attended, hidden, scores, factors, everything,
        no_rows, out,
    )  # fmt: skip


@inner
def _blocks(
    known, states, entrance, qkv, attention_out, query, cross_out, up, down, project,
    qkv_bias, attention_out_bias, query_bias, cross_out_bias, up_bias, down_bias, project_bias,
    eps, is_gelu, kept, keys, values, memory_keys, memory_values, memory_size, column, begin,
    ancestors, x, normed, projected, asked, attended, hidden, scores, factors, everything,
    no_rows, out,
):  # fmt: skip
    num_layers, batch, num_heads, head_dim, _ = keys.shape
    num_rows, width = known.shape
    each = num_rows // batch
    for r in range(num_rows):
        copy(known[r], x[r])
    centre_all(states, width, eps, normed)
    add_product(normed, entrance, x)
    for layer in range(num_layers):
        centre_all(x, width, eps, normed)
        affine(normed, qkv[layer], qkv_bias[layer], projected)
        # Of rows that nobody asks for the last layer makes keys and values only.
        first = num_rows - out.shape[0] if layer == num_layers - 1 else 0
        for b in range(batch):
            lo, hi = b * each, (b + 1) * each
            for h in range(num_heads):
                its_keys, its_values = keys[layer, b, h], values[layer, b, h]
                start = width + h * head_dim
                place(projected, start, start + width, lo, hi, its_keys, its_values, column[b])
                attend(
                    projected, h * head_dim, lo + first, hi, its_keys, its_values, 0, 0,
                    begin[b] + first, ancestors, scores, factors, attended, h * head_dim,
                )  # fmt: skip
        each -= first
        x, normed, attended = x[first:], normed[first:], attended[first:]
        asked, hidden, states = asked[first:], hidden[first:], states[first:]
        add_to_all(x, attention_out_bias[layer])
        add_product(attended, attention_out[layer], x)
        if memory_size:
            centre_all(x, width, eps, normed)
            affine(normed, query[layer], query_bias[layer], asked)
            for b in range(batch):
                lo, hi = b * each, (b + 1) * each
                lender = b % memory_keys.shape[1]
                size, seen = memory_size, everything
                if memory_size < 0:
                    size, seen = column[b] + 1 + first, no_rows
                for h in range(num_heads):
                    attend(
                        asked, h * head_dim, lo, hi, memory_keys[layer, lender, h],
                        memory_values[layer, lender, h], 0, 0, size, seen,
                        scores, factors, attended, h * head_dim,
                    )  # fmt: skip
            add_to_all(x, cross_out_bias[layer])
            add_product(attended, cross_out[layer], x)
        centre_all(x, width, eps, normed)
        affine(normed, up[layer], up_bias[layer], hidden)
        for r in range(batch * each):
            if is_gelu:
                gelu(hidden[r])
            else:
                swish(hidden[r], ONE)
        add_to_all(x, down_bias[layer])
        add_product(hidden, down[layer], x)
    centre_all(x, width, eps, normed)
    affine(normed, project, project_bias, x)
    for r in range(batch * each):
        for j in range(width):
            out[r, j] = x[r, j] + kept * states[r, j]

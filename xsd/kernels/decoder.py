"""A pass through a Llama decoder."""

from __future__ import annotations

import numpy as np

from xsd.kernels import PANEL
from xsd.kernels.argmax import choose
from xsd.kernels.attention import attend, place
from xsd.kernels.options import exact, inner
from xsd.kernels.products import NARROW, add_product
from xsd.kernels.rows import ZERO, copy, gated, normalise, turn
from xsd.kernels.waiting import publish, wait_for


@exact
def decoder_pass(
    rows, qkv, attention_out, gate_up, down, final_norm, eps, cos, sin, keys, values,
    hole_start, hole_end, begin, positions, ancestors, states,
):  # fmt: skip
    """R new rows of each of B answers through a Llama decoder, behind what a cache holds.

    Weights are packed; those behind a norm hold its factors, those of queries also
    ``1 / sqrt(Dh)``. H query heads, G key heads.

    Args:
        rows: [B R, D] embeddings.
        qkv: [L, P, D, 64] for (H + 2 G) Dh columns.
        attention_out: [L, P, H Dh, 64].
        gate_up: [L, P, D, 64] for 2 F columns.
        down: [L, P, F, 64].
        final_norm: [D]; empty: these are not the last layers.
        eps: float32, of the norms.
        cos, sin: [positions, Dh / 2].
        keys: [L, >= B, G, Dh, columns], at least 64 more columns than are in use; written.
        values: [L, >= B, G, columns, Dh]; written.
        hole_start: first column of the padding.
        hole_end: [B] int64: where every entry's ends.
        begin: [B] int64: column of the first new row.
        positions: [B R] int64.
        ancestors: [R, R] bool: which of each other the rows see; empty: those before them.
        states: [B R, D], overwritten: after the final norm, or what the next layers take.
    """
    num_rows = rows.shape[0]
    room = _room(num_rows, qkv, attention_out, gate_up, down, keys)
    _layers(
        rows, qkv, attention_out, gate_up, down, final_norm, eps, cos, sin, keys, values,
        hole_start, hole_end, begin, positions, ancestors, *room, states,
        np.zeros(0, np.int64), 0, True,
    )  # fmt: skip


@exact
def _room(num_rows, qkv, attention_out, gate_up, down, keys):
    """What a pass of so many rows writes on its way."""
    return (
        np.zeros((num_rows, down.shape[1] * PANEL), np.float32),
        np.empty((num_rows, qkv.shape[2]), np.float32),
        np.empty((num_rows, qkv.shape[1] * PANEL), np.float32),
        np.zeros((num_rows, attention_out.shape[2] + NARROW), np.float32),
        np.empty((num_rows, gate_up.shape[1] * PANEL), np.float32),
        np.empty((num_rows, keys.shape[4] + PANEL), np.float32),
        np.empty(num_rows, np.float32),
    )


@exact
def share_of_pass(
    core, num_cores, bounds, num_read, placed, rows, qkv, attention_out, gate_up, down, final_norm,
    eps, cos, sin, keys, values, hole_start, hole_end, begin, positions,
):  # fmt: skip
    """One core's share of a long pass: every ``num_cores``-th chunk of it, through all layers.

    In every layer a chunk attends to those before it, so it follows the one before at a distance
    of one layer, on another core.

    Args:
        core: which of them this is; the first one returns when all are done.
        bounds: [chunks + 1] int64: ends of the chunks in every answer's rows.
        num_read: of so many chunks, the last ones, the states are asked for; of the others the
            last layer makes keys and values only, and their rows become anything.
        placed: [chunks] int64, zeros at first: layers whose keys and values a chunk has written,
            one more when its states are there. Shared by the cores.
        rows: [B R, D], chunk after chunk, each of all B answers; overwritten with the states.
        positions: [B R] int64, in the same order.

    The rest as for ``decoder_pass``.
    """
    num_chunks, batch = bounds.shape[0] - 1, begin.shape[0]
    most = 0
    for c in range(core, num_chunks, num_cores):
        most = max(most, batch * (bounds[c + 1] - bounds[c]))
    x, normed, projected, attended, both, scores, factors = _room(
        most, qkv, attention_out, gate_up, down, keys
    )
    columns, chain = np.empty(batch, np.int64), np.zeros((0, 0), np.bool_)
    for c in range(core, num_chunks, num_cores):
        lo, hi = batch * bounds[c], batch * bounds[c + 1]
        n = hi - lo
        for b in range(batch):
            columns[b] = begin[b] + bounds[c]
        x[:] = ZERO
        is_whole = _layers(
            rows[lo:hi], qkv, attention_out, gate_up, down, final_norm, eps, cos, sin, keys, values,
            hole_start, hole_end, columns, positions[lo:hi], chain,
            x[:n], normed[:n], projected[:n], attended[:n], both[:n], scores[:n], factors[:n],
            rows[lo:hi], placed, c, c >= num_chunks - num_read,
        )  # fmt: skip
        if not is_whole:
            return
        publish(placed, c, keys.shape[0] + 1)
    if core == 0:
        for c in range(num_chunks):
            wait_for(placed, c, keys.shape[0] + 1)


@exact
def read_pass(
    ids, embedding, lm_head, num_ids, qkv, attention_out, gate_up, down, final_norm, eps, cos, sin,
    keys, values, hole_start, hole_end, begin, positions, ancestors, states, chosen,
):  # fmt: skip
    """A pass from tokens to tokens, for one answer.

    Args:
        ids: [R] int64.
        embedding: [V, D].
        lm_head: [P, D, 64], packed.
        num_ids: choose among the first so many.
        chosen: [R] int64, overwritten: the likeliest token of every row.

    The rest as for ``decoder_pass``. Returns whether the embedding knows all ``ids``; if not,
    nothing is done.
    """
    rows = np.empty((ids.shape[0], embedding.shape[1]), np.float32)
    for r in range(ids.shape[0]):
        if not 0 <= ids[r] < embedding.shape[0]:
            return False
        copy(embedding[ids[r]], rows[r])
    decoder_pass(
        rows, qkv, attention_out, gate_up, down, final_norm, eps, cos, sin, keys, values,
        hole_start, hole_end, begin, positions, ancestors, states,
    )  # fmt: skip
    choose(states, lm_head, num_ids, chosen)
    return True


@inner
def _layers(
    rows, qkv, attention_out, gate_up, down, final_norm, eps, cos, sin, keys, values,
    hole_start, hole_end, begin, positions, ancestors,
    x, normed, projected, attended, both, scores, factors, states, placed, chunk, is_read,
):  # fmt: skip
    """``placed``: see ``share_of_pass``; empty: nobody waits. Returns whether nobody gave up."""
    num_layers, _, kv_heads, head_dim, _ = keys.shape
    (num_rows, width), batch = rows.shape, begin.shape[0]
    each = num_rows // batch
    num_heads, ffn, half = attention_out.shape[2] // head_dim, down.shape[2], head_dim // 2
    group = num_heads // kv_heads
    for r in range(num_rows):
        copy(rows[r], x[r])
    for layer in range(num_layers):
        for r in range(num_rows):
            normalise(x[r, :width], ZERO, eps, normed[r])
        projected[:] = ZERO
        add_product(normed, qkv[layer], projected)
        for r in range(num_rows):
            turn(projected[r], num_heads + kv_heads, half, cos[positions[r]], sin[positions[r]])
        for b in range(batch):
            for g in range(kv_heads):
                place(
                    projected, (num_heads + g) * head_dim, (num_heads + kv_heads + g) * head_dim,
                    b * each, (b + 1) * each, keys[layer, b, g], values[layer, b, g], begin[b],
                )  # fmt: skip
        if placed.shape[0]:
            # Chunks finish in no order: what the one before has placed, those before it have too.
            if chunk and not wait_for(placed, chunk - 1, layer + 1):
                return False
            publish(placed, chunk, layer + 1)
        if layer == num_layers - 1 and not is_read:
            return True
        for b in range(batch):
            lo, hi = b * each, (b + 1) * each
            for h in range(num_heads):
                attend(
                    projected, h * head_dim, lo, hi,
                    keys[layer, b, h // group], values[layer, b, h // group],
                    hole_start, hole_end[b], begin[b], ancestors,
                    scores, factors, attended, h * head_dim,
                )  # fmt: skip
        add_product(attended, attention_out[layer], x)
        for r in range(num_rows):
            normalise(x[r, :width], ZERO, eps, normed[r])
        both[:] = ZERO
        add_product(normed, gate_up[layer], both)
        for r in range(num_rows):
            gated(both[r, :ffn], both[r, ffn : 2 * ffn])
        add_product(both, down[layer], x)
    for r in range(num_rows):
        if final_norm.shape[0]:
            normalise(x[r, :width], ZERO, eps, states[r])
            for j in range(width):
                states[r, j] *= final_norm[j]
        else:
            copy(x[r, :width], states[r])
    return True

"""What adapters make of the drafter's states, and chains in which drafter and adapter step in
turn."""

from __future__ import annotations

import numpy as np

from xsd.kernels import PANEL
from xsd.kernels.argmax import choose_in
from xsd.kernels.attention import place
from xsd.kernels.decoder import decoder_pass
from xsd.kernels.head import head_pass
from xsd.kernels.options import exact
from xsd.kernels.products import add_product
from xsd.kernels.rows import ONE, ZERO, centre, softmax


@exact
def _bridge(drafter, panels, out):
    """Drafter states at the verifier's width; of no panels: they have it."""
    width = out.shape[1]
    if not panels.shape[0]:
        out[:] = drafter
        return
    wide = np.zeros((drafter.shape[0], panels.shape[0] * PANEL), np.float32)
    add_product(drafter, panels, wide)
    out[:] = wide[:, :width]


@exact
def _fuse(drafter, verifier, panels, bias, factor, eps, known):
    """``known += factor * norm(g e + (1 - g) v + P[e; v])`` with ``g = sigmoid(W[e; v])``."""
    num_rows, width = verifier.shape
    both = np.empty((num_rows, 2 * width), np.float32)
    both[:, :width] = drafter
    both[:, width:] = verifier
    mixed = np.empty((num_rows, panels.shape[0] * PANEL), np.float32)
    normed = np.empty(width, np.float32)
    for r in range(num_rows):
        mixed[r] = bias
    add_product(both, panels, mixed)
    for r in range(num_rows):
        for j in range(width):
            gate = ONE / (ONE + np.exp(-mixed[r, j]))
            apart = drafter[r, j] - verifier[r, j]
            mixed[r, width + j] += verifier[r, j] + gate * apart
        centre(mixed[r, width : 2 * width], eps, normed)
        for j in range(width):
            known[r, j] += factor[j] * normed[j]


@exact
def remember(states, panels, bias, eps, memory_keys, memory_values, column):
    """States become keys and values of cross-attention, as many for each of B answers or clips.

    Args:
        states: [B n, D].
        panels: [L, P, D, 64], behind a norm; bias: [L, 64 P].
        memory_keys: [L, B, H, Dh, columns], written from ``column`` on; memory_values: [L, B, H,
            columns, Dh].
    """
    num_layers, batch, num_heads, head_dim, _ = memory_keys.shape
    num_rows, width = states.shape
    each = num_rows // batch
    normed = np.empty((num_rows, width), np.float32)
    projected = np.empty((num_rows, bias.shape[1]), np.float32)
    for r in range(num_rows):
        centre(states[r], eps, normed[r])
    for layer in range(num_layers):
        for r in range(num_rows):
            projected[r] = bias[layer]
        add_product(normed, panels[layer], projected)
        for b in range(batch):
            for h in range(num_heads):
                start = h * head_dim
                place(
                    projected, start, start + width, b * each, (b + 1) * each,
                    memory_keys[layer, b, h], memory_values[layer, b, h], column,
                )  # fmt: skip


@exact
def pool(states, means):
    """Means [K, D] over runs of neighbours: of ``states`` [n, D], row i is in run i * K // n."""
    num_rows, num_runs = states.shape[0], means.shape[0]
    start = 0
    for k in range(num_runs):
        means[k] = ZERO
        stop = start
        while stop < num_rows and stop * num_runs // num_rows == k:
            for j in range(means.shape[1]):
                means[k, j] += states[stop, j]
            stop += 1
        size = np.float32(stop - start)
        for j in range(means.shape[1]):
            means[k, j] /= size
        start = stop


@exact
def enter_rows(
    drafter, verifier, entry, eps, memory_keys, memory_values, column, known, states
):  # fmt: skip
    """Begin R rows of each of B answers with what the drafter's states add to them.

    Args:
        drafter: [B R, Dd]; where they are remembered [B n, Dd].
        verifier: [B R, D]; not read by adapters of the drafter alone.
        entry: bridge [P, Dd, 64] or of no panels; fusing weights [P, 2 D, 64] or of no panels,
            their bias [64 P], and the factor [D] of the norm behind them; remembering weights
            [L, P, D, 64] or of no layers, and their bias [L, 64 P]; whether rows begin with the
            states as they are.
        memory_keys, memory_values: written from ``column`` on, where states are remembered.
        known: [B R, D], as for ``head_pass``: added to.
        states: [B R, D], overwritten: what ``head_pass`` takes.
    """
    bridge, fuse, fuse_bias, factor, remembered, remembered_bias, is_raw = entry
    width = known.shape[1]
    entered = np.empty((drafter.shape[0], width), np.float32)
    _bridge(drafter, bridge, entered)
    if remembered.shape[0]:
        remember(entered, remembered, remembered_bias, eps, memory_keys, memory_values, column)
        states[:] = verifier
    elif fuse.shape[0]:
        _fuse(entered, verifier, fuse, fuse_bias, factor, eps, known)
        states[:] = verifier
    else:
        states[:] = entered
        if is_raw:
            known += entered


@exact
def _read(tokens, embedding, decoder, column, out):
    """The drafter reads tokens behind a cache's first columns; ``out``: its states."""
    num_rows = tokens.shape[0]
    rows = np.empty((num_rows, embedding.shape[1]), np.float32)
    positions = np.empty(num_rows, np.int64)
    for r in range(num_rows):
        rows[r] = embedding[tokens[r]]
        positions[r] = column + r
    begin, no_hole = np.full(1, column), np.zeros(1, np.int64)
    decoder_pass(
        rows, *decoder, 0, no_hole, begin, positions, np.zeros((0, 0), np.bool_), out
    )  # fmt: skip


@exact
def coupled_chain(
    sequence, num_said, num_read, prompt_length, drafter_states, embedding, decoder,
    first, shift, states, table, at_positions, eos, lm_head, num_ids,
    entry, weights, eps, is_gelu, kept, keys, values, memory_keys, memory_values, memory_size,
    confidence,
):  # fmt: skip
    """Draft for one answer with an adapter that reads the drafter: at each step the drafter reads
    the token that the adapter chose.

    Args:
        sequence: [n + gamma] int64: what is said; drafts are written behind it.
        num_said: n.
        num_read: tokens of ``sequence`` that the drafter has read before.
        prompt_length: columns of the drafter's cache before them.
        drafter_states: [>= n + gamma + 1, Dd]: behind so many tokens of ``sequence``; written.
        embedding: [V, Dd] of the drafter.
        decoder: its arguments of ``decoder_pass``, weights to cache.
        first: position of the first new row of the adapter, and its column.
        shift: 1: a row predicts what follows its position's token; 0: that token.
        states: [m, D]: the verifier's from position ``first`` on; not read by adapters of the
            drafter alone.
        table, at_positions, eos, lm_head, num_ids: as in ``draft``'s vocabulary.
        entry: as for ``enter_rows``.
        weights: of ``head_pass``, entrance to bias of the projection. The rest as for it.
        confidence: [gamma] float64, overwritten: how probable each draft seems to the adapter.

    Returns how many tokens were drafted, and how many the drafter has read now.
    """
    width = at_positions.shape[1]
    remembers = entry[4].shape[0] > 0
    ahead = 1 if remembers else 0
    column, chain = np.empty(1, np.int64), np.zeros((0, 0), np.bool_)
    token, logits = np.empty(1, np.int64), np.empty((1, lm_head.shape[0] * PANEL), np.float32)
    given, end = states, num_said
    while True:
        stop = end - shift + 1
        needed = stop - 1 + ahead
        if num_read < needed:
            _read(
                sequence[num_read:needed], embedding, decoder, prompt_length + num_read,
                drafter_states[num_read + 1 : needed + 1],
            )  # fmt: skip
            num_read = needed
        num_rows = stop - first
        known = np.empty((num_rows, width), np.float32)
        for r in range(num_rows):
            known[r] = at_positions[first + r]
            if table.shape[0]:
                known[r] += table[sequence[first + r]]
        # Nothing is remembered of position 0 but with the first row.
        since = first + ahead if first else 0
        inputs = np.empty((num_rows, width), np.float32)
        out = np.empty((1, width), np.float32)
        enter_rows(
            drafter_states[since : stop + ahead], given, entry, eps, memory_keys, memory_values,
            since, known, inputs,
        )  # fmt: skip
        column[0] = first
        head_pass(
            known, inputs, *weights, eps, is_gelu, kept, keys, values, memory_keys, memory_values,
            memory_size, column, column, chain, out,
        )  # fmt: skip
        given = out
        choose_in(given, lm_head, num_ids, logits, token)
        sequence[end] = token[0]
        # The likeliest one's share is its exponential, one, over the sum of all.
        confidence[end - num_said] = softmax(logits[0], num_ids)
        end += 1
        first = stop
        ends = end == sequence.shape[0]
        for i in range(eos.shape[0]):
            ends |= token[0] == eos[i]
        if ends:
            return end - num_said, num_read

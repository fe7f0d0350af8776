"""Decoding of one answer, plain or with a head's drafts: many cycles in one call."""

from __future__ import annotations

import numpy as np

from xsd.kernels.argmax import choose
from xsd.kernels.decoder import decoder_pass
from xsd.kernels.drafting import draft, is_among
from xsd.kernels.options import exact
from xsd.kernels.rule import best_size, learn, may_draft
from xsd.kernels.ticks import ticks

NUM_SAID, NUM_CACHED, NUM_READ, NUM_CYCLES, NUM_CALLS = range(5)
"""Of ``at``: tokens said; positions in the verifier's cache; tokens the head has read; cycles with
drafts, and passes, of this call."""
DRAFTING, READING, CHOOSING, ALL = range(4)
"""Of ``spent``: ticks of a head's drafts, of the verifier's layers, of its LM head, of all of a
call."""


@exact
def _keep(keys, values, start, path):
    """Move the rows of a path up to each other: the root's stays at column ``start``."""
    for k in range(path.shape[0]):
        source, target = start + 1 + path[k], start + 1 + k
        if source != target:
            for layer in range(keys.shape[0]):
                for g in range(keys.shape[2]):
                    keys[layer, 0, g, :, target] = keys[layer, 0, g, :, source]
                    values[layer, 0, g, target] = values[layer, 0, g, source]


@exact
def verify(verifier, keys, values, embedding, panels, num_ids, last, tokens, parents, start,
           states, ids, path, spent):  # fmt: skip
    """One pass of the last token and a draft behind the cache, and what of the draft holds.

    Args:
        verifier: what ``decoder_pass`` takes from ``qkv`` to ``sin``.
        keys, values: as ``decoder_pass`` takes them.
        embedding: [V, D].
        panels: the packed LM head, to choose among the first ``num_ids``.
        tokens, parents: [n] int64.
        start: position and column of the last token.
        states: [n + 1, D], overwritten; those of the path are moved up.
        ids: [n + 1] int64, overwritten: what the verifier says behind every row.
        path: [n] int64, overwritten.
        spent: [4] int64, see the names above; added to.

    Returns how many hold; the verifier's own token behind them is ``ids`` of the last row kept.
    """
    size = tokens.shape[0]
    rows = np.empty((size + 1, embedding.shape[1]), np.float32)
    rows[0] = embedding[last]
    positions = np.empty(size + 1, np.int64)
    positions[0] = start
    is_chain = True
    for i in range(size):
        rows[i + 1] = embedding[tokens[i]]
        positions[i + 1] = positions[parents[i] + 1] + 1
        is_chain = is_chain and parents[i] == i - 1
    ancestors = np.zeros((0, 0), np.bool_)
    if not is_chain:
        ancestors = np.zeros((size + 1, size + 1), np.bool_)
        ancestors[0, 0] = True
        for i in range(size):
            ancestors[i + 1] = ancestors[parents[i] + 1]
            ancestors[i + 1, i + 1] = True
    begin, hole = np.empty(1, np.int64), np.zeros(1, np.int64)
    begin[0] = start
    began = ticks()
    decoder_pass(rows, *verifier, keys, values, 0, hole, begin, positions, ancestors, states)
    read = ticks()
    choose(states, panels, num_ids, ids)
    spent[READING] += read - began
    spent[CHOOSING] += ticks() - read
    held, node = 0, -1
    while True:
        following = -1
        for i in range(node + 1, size):
            if parents[i] == node and tokens[i] == ids[node + 1]:
                following = i
                break
        if following == -1:
            break
        path[held], node = following, following
        held += 1
    token = ids[node + 1]
    _keep(keys, values, start, path[:held])
    for k in range(held):
        states[k + 1] = states[path[k] + 1]
    return held, token


@exact
def speak(
    verifier, keys, values, embedding, panels, num_ids, eos, head, past, vocabulary, rule,
    gamma, width, num_nodes, is_sure, num_calls, tokens, states, at, drafted, accepted,
    spent,
):  # fmt: skip
    """Decode on, until the answer ends, is full, or ``num_calls`` passes are made.

    Args:
        verifier, keys, values, embedding, panels, num_ids: as ``verify`` takes them.
        eos: [n] int64: tokens that end an answer.
        head, past, vocabulary, rule, gamma, width, num_nodes, is_sure: as ``draft`` takes them; a
            gamma of 0 is plain decoding, and no head is looked at.
        tokens: [max_new_tokens] int64: those said.
        states: [max_new_tokens + 1, D]: of every token said, the state that predicted it.
        at: [5] int64, see the names above; updated.
        drafted, accepted: [max_new_tokens] int64: of every cycle with drafts; written.
        spent: as ``verify`` takes it.
    """
    began = ticks()
    limit = tokens.shape[0]
    room = max(1, gamma * width * width)
    drafts, parents = np.empty(room, np.int64), np.empty(room, np.int64)
    sure, joint = np.empty(room, np.float64), np.empty(room, np.float64)
    rows = np.empty((room + 1, states.shape[1]), np.float32)
    ids, path = np.empty(room + 1, np.int64), np.empty(room, np.int64)
    at[NUM_CYCLES] = at[NUM_CALLS] = 0
    while at[NUM_SAID] < limit and at[NUM_CALLS] < num_calls:
        said = at[NUM_SAID]
        if is_among(tokens[said - 1], eos):
            break
        # The verifier's own token ends the answer: one draft less than there is room.
        depth = min(gamma, limit - said - 1)
        size = levels = 0
        if depth > 0 and may_draft(rule):
            asked, read = ticks(), at[NUM_READ]
            count, levels = draft(
                tokens[read:said], states[read:said], read, head, past, vocabulary, rule, depth,
                width, num_nodes, is_sure, drafts, parents, sure, joint,
            )  # fmt: skip
            at[NUM_READ] = said
            size = best_size(rule, joint[:count])
            spent[DRAFTING] += ticks() - asked
        start = at[NUM_CACHED]
        held, token = verify(
            verifier, keys, values, embedding, panels, num_ids, tokens[said - 1], drafts[:size],
            parents[:size], start, rows[: size + 1], ids[: size + 1], path[:size], spent,
        )  # fmt: skip
        if levels:
            learn(rule, parents[:size], sure[:size], path[:held], levels)
        if size:
            drafted[at[NUM_CYCLES]], accepted[at[NUM_CYCLES]] = size, held
            at[NUM_CYCLES] += 1
        at[NUM_CALLS] += 1
        at[NUM_CACHED] = start + 1 + held
        for k in range(held):
            tokens[said + k] = drafts[path[k]]
            states[said + k] = rows[k]
        said += held
        # The verifier's own token does not follow an end.
        if held == 0 or not is_among(tokens[said - 1], eos):
            tokens[said] = token
            states[said] = rows[held]
            said += 1
        at[NUM_SAID] = said
    spent[ALL] += ticks() - began

"""What a head drafts in a cycle: new rows in, a chain or a tree of tokens out."""

from __future__ import annotations

import numpy as np

from xsd.kernels import PANEL
from xsd.kernels.head import head_pass
from xsd.kernels.options import exact, inner
from xsd.kernels.products import add_product
from xsd.kernels.rows import ZERO, maximum, softmax
from xsd.kernels.rule import chance, goes_on


@inner
def _index_of_largest(row):
    best = maximum(row)
    j = 0
    # A NaN equals nothing, not even itself.
    while j < row.shape[0] - 1 and row[j] != best:
        j += 1
    return j


@inner
def _know(table, token, position, known):
    """What is known of a row before its state."""
    for j in range(known.shape[0]):
        known[j] = position[j]
        if table.shape[0]:
            known[j] += table[token, j]


@inner
def is_among(token, ids):
    found = False
    for i in range(ids.shape[0]):
        found = found or token == ids[i]
    return found


@exact
def _order(tokens, parents, confidence, joint, num_nodes):
    """The likeliest nodes to the front, the first of equals first: no node is likelier than its
    parent, so they connect. Returns how many are kept."""
    count = tokens.shape[0]
    size = min(count, num_nodes)
    number, is_taken = np.empty(count, np.int64), np.zeros(count, np.bool_)
    order = np.empty(size, np.int64)
    for k in range(size):
        best = -1
        for i in range(count):
            if not is_taken[i] and (best == -1 or joint[i] > joint[best]):
                best = i
        order[k], number[best], is_taken[best] = best, k, True
    before = parents[:count].copy()
    for values in (confidence, joint):
        values[:size] = values[order]
    tokens[:size] = tokens[order]
    for k in range(size):
        parent = before[order[k]]
        parents[k] = parent if parent == -1 else number[parent]
    return size


@exact
def draft(
    said, states, start, head, past, vocabulary, rule, gamma, width, num_nodes, is_sure,
    tokens, parents, confidence, joint,
):  # fmt: skip
    """Level by level the likeliest nodes branch (EAGLE-2, arXiv:2406.16858), while the rule says
    that it pays; a head's rows of one level are one pass. With a width of one it is a chain.

    Args:
        said: [m] int64: the last tokens of the answer.
        states: [m, D]: the verifier's behind them.
        start: position of the first of ``said``, and its column in the cache.
        head: what ``head_pass`` takes from ``entrance`` to ``kept``.
        past: what it takes from ``keys`` to ``memory_size``.
        vocabulary: the table [V, D] of what the head reads of every token (of none: it reads no
            tokens), what it reads of positions [positions, D], the packed LM head, how many tokens
            to choose among, and those that end an answer, [n] int64.
        rule: see ``rule``.
        gamma: levels.
        width: branches of a node, and nodes of a level that branch.
        num_nodes: keep so many tokens at most.
        is_sure: the confidences of a chain need not be known.
        tokens, parents: [gamma * width ** 2] int64, overwritten: the likeliest first and parents
            before what follows them; -1 is the last token said.
        confidence, joint: the same float64: of every token behind its parent, and of it with all
            before it as the rule sees them.

    Returns how many are kept, and how many levels deep was drafted.
    """
    table, at_positions, panels, num_ids, eos = vocabulary
    dim, base = states.shape[1], start + said.shape[0]
    column, begin = np.empty(1, np.int64), np.empty(1, np.int64)
    seen = np.zeros((0, 0), np.bool_)
    slots = np.empty(gamma * width * width, np.int64)
    frontier, chosen = np.empty(width, np.int64), np.empty(width, np.int64)
    frontier[0], num_open = -1, 1
    line = np.empty(panels.shape[0] * PANEL + PANEL, np.float32)
    inputs = states
    known = np.empty((said.shape[0], dim), np.float32)
    for r in range(said.shape[0]):
        _know(table, said[r], at_positions[start + r], known[r])
    column[0] = begin[0] = start
    count, is_chain, level = 0, True, 0
    while True:
        # Nobody reads the outputs of the tokens before the last; the keys of all are kept.
        out = np.empty((num_open, dim), np.float32)
        head_pass(known, inputs, *head, *past, column, begin, seen, out)
        column[0] += known.shape[0]
        logits = np.zeros((num_open, panels.shape[0] * PANEL), np.float32)
        add_product(out, panels, logits)
        first = count
        for f in range(num_open):
            row = logits[f, :num_ids]
            before = 1.0 if frontier[f] == -1 else joint[frontier[f]]
            factor = ZERO
            if not is_sure:
                line[:num_ids] = row
                factor = softmax(line, num_ids)
            for _ in range(width):
                token = _index_of_largest(row)
                tokens[count], parents[count] = token, frontier[f]
                confidence[count] = 1.0 if is_sure else line[token] * factor
                joint[count] = before * chance(rule, confidence[count])
                row[token] = -np.inf
                count += 1
        level += 1
        if level == gamma:
            break
        num_chosen = 0
        while num_chosen < width:
            best = -1
            for i in range(first, count):
                if is_among(tokens[i], eos) or is_among(i, chosen[:num_chosen]):
                    continue
                if best == -1 or joint[i] > joint[best]:
                    best = i
            if best == -1:
                break
            # What is likelier is verified first.
            rank = 0
            for i in range(count):
                rank += joint[i] >= joint[best]
            if not goes_on(rule, joint[best], rank):
                break
            chosen[num_chosen] = best
            num_chosen += 1
        if num_chosen == 0:
            break
        inputs = np.empty((num_chosen, dim), np.float32)
        known = np.empty((num_chosen, dim), np.float32)
        for c in range(num_chosen):
            node = chosen[c]
            f = 0
            while frontier[f] != parents[node]:
                f += 1
            inputs[c] = out[f]
            _know(table, tokens[node], at_positions[base + level - 1], known[c])
            slots[node] = column[0] + c
        is_chain = is_chain and num_chosen == 1
        begin[0] = column[0] if is_chain else base
        if not is_chain:
            seen = np.zeros((num_chosen, column[0] + num_chosen - base), np.bool_)
            for c in range(num_chosen):
                node = chosen[c]
                while node != -1:
                    seen[c, slots[node] - base] = True
                    node = parents[node]
        frontier[:num_chosen] = chosen[:num_chosen]
        num_open = num_chosen
    if width > 1:
        count = _order(tokens[:count], parents, confidence, joint, num_nodes)
    return min(count, num_nodes), level

"""Chains of drafts: a head's whole cycle."""

from __future__ import annotations

import numpy as np

from xsd.kernels.argmax import choose
from xsd.kernels.head import head_pass
from xsd.kernels.options import exact


@exact
def _know(table, token, position, known):
    """What is known of a row before its state."""
    for j in range(known.shape[0]):
        known[j] = position[j]
        if table.shape[0]:
            known[j] += table[token, j]


@exact
def draft_chain(
    said, states, table, at_positions, start, eos, lm_head, num_ids,
    entrance, qkv, attention_out, query, cross_out, up, down, project,
    qkv_bias, attention_out_bias, query_bias, cross_out_bias, up_bias, down_bias, project_bias,
    eps, is_gelu, kept, keys, values, memory_keys, memory_values, memory_size, drafts,
):  # fmt: skip
    """A whole cycle of a head that drafts for one answer: new rows in, a chain of tokens out.

    Args:
        said: [m] int64: the last tokens of the answer.
        states: [m, D]: the verifier's behind them.
        table: [V, D]: what the head reads of every token; of none: it reads no tokens.
        at_positions: [positions, D].
        start: position of the first of ``said``, and its column in the cache.
        eos: [n] int64: tokens that end a chain.
        lm_head: [P, D, 64], packed.
        num_ids: choose among the first so many tokens.
        drafts: [gamma] int64, overwritten.

    The rest as for ``head_pass``. Returns how many were drafted.
    """
    width = states.shape[1]
    column, chain = np.empty(1, np.int64), np.zeros((0, 0), np.bool_)
    token = np.empty(1, np.int64)
    # Nobody reads the outputs of the tokens before the last; the keys of all are kept.
    num_rows, inputs = said.shape[0], states
    known = np.empty((num_rows, width), np.float32)
    for r in range(num_rows):
        _know(table, said[r], at_positions[start + r], known[r])
    out = np.empty((num_rows, width), np.float32)
    column[0] = start
    for step in range(drafts.shape[0]):
        head_pass(
            known, inputs, entrance, qkv, attention_out, query, cross_out, up, down, project,
            qkv_bias, attention_out_bias, query_bias, cross_out_bias, up_bias, down_bias,
            project_bias, eps, is_gelu, kept, keys, values, memory_keys, memory_values, memory_size,
            column, column, chain, out,
        )  # fmt: skip
        last = out[out.shape[0] - 1 :]
        choose(last, lm_head, num_ids, token)
        drafts[step] = token[0]
        for i in range(eos.shape[0]):
            if token[0] == eos[i]:
                return step + 1
        if step + 1 == drafts.shape[0]:
            break
        column[0] += known.shape[0]
        inputs = last.copy()
        known, out = np.empty((1, width), np.float32), np.empty((1, width), np.float32)
        _know(table, token[0], at_positions[column[0]], known[0])
    return drafts.shape[0]

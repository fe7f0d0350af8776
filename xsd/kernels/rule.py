"""How much to draft and to verify: a policy as numbers, which kernels and Python go by alike.

A rule is a tuple:

- tried, held: [16] float64: of the drafts in every bucket of confidence, how many were verified
  behind nothing but accepted ones, and how many of them held;
- verify_ms: [n] float64: what passes of 1, 2, ... rows cost; empty: everything is drafted and
  verified;
- pace: [7] float64: see the names below.
"""

from __future__ import annotations

import numpy as np

from xsd.kernels.options import exact

EDGES = np.array(
    (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.9995)
)
"""Between the buckets: close together where a chain of many drafts is decided."""
NUM_BUCKETS = len(EDGES) + 1
TOKEN_MS, MEAN, FIRST_MS, LEVEL_MS, GAIN_MS, LEFT, LENGTH = range(7)
"""Of ``pace``: what a token costs of late; how often a next draft holds; what drafting the first
level costs, and each further one; what a cycle gains of late; cycles left to rest, and how long
the next rest will be."""
PRIOR = 4.0
"""So many drafts is the drafter's own word worth against what was seen."""
MEMORY = 0.1
"""Weight of the newest value in a running mean."""
SHORTEST_REST, LONGEST_REST = 2.0, 128.0


@exact
def bucket(confidence):
    found = 0
    while found < EDGES.shape[0] and confidence >= EDGES[found]:
        found += 1
    return found


@exact
def chance(rule, confidence):
    """That a draft holds whose drafter is so sure of it."""
    tried, held, verify_ms, _ = rule
    if not verify_ms.shape[0]:
        return float(confidence)
    i = bucket(confidence)
    return (held[i] + PRIOR * confidence) / (tried[i] + PRIOR)


@exact
def pass_ms(verify_ms, num_rows):
    return verify_ms[min(num_rows, verify_ms.shape[0]) - 1]


@exact
def goes_on(rule, joint, size):
    """Whether to draft behind a token that holds, with all before it, with chance ``joint``, when
    ``size`` are drafted."""
    _, _, verify_ms, pace = rule
    if not verify_ms.shape[0]:
        return True
    row_ms = pass_ms(verify_ms, size + 2) - pass_ms(verify_ms, size + 1)
    return joint * pace[MEAN] * pace[TOKEN_MS] > pace[LEVEL_MS] + row_ms


@exact
def best_size(rule, joint):
    """The number of drafts, likeliest first, whose tokens are worth the most more than their rows
    cost. ``joint``: [n] float64."""
    _, _, verify_ms, pace = rule
    size = joint.shape[0]
    if not verify_ms.shape[0]:
        return size
    best, best_gain, worth = 0, 0.0, 0.0
    for n in range(1, size + 1):
        worth += joint[n - 1] * pace[TOKEN_MS]
        gain = worth - (pass_ms(verify_ms, n + 1) - verify_ms[0])
        if gain > best_gain:
            best, best_gain = n, gain
    return best


@exact
def joint_chances(rule, parents, confidence):
    """Of every draft, that it holds with all before it. Parents, [n] int64, come first; -1: the
    last token said. ``confidence``: [n] float64."""
    joint = np.empty(parents.shape[0], np.float64)
    for i in range(parents.shape[0]):
        before = 1.0 if parents[i] == -1 else joint[parents[i]]
        joint[i] = before * chance(rule, confidence[i])
    return joint


@exact
def may_draft(rule):
    """Whether this cycle should draft at all; asked once a cycle."""
    _, _, verify_ms, pace = rule
    if not verify_ms.shape[0]:
        return True
    if pace[LEFT] > 0.0:
        pace[LEFT] -= 1.0
    return pace[LEFT] == 0.0


@exact
def learn(rule, parents, confidence, path, num_levels):
    """What became of a cycle.

    Args:
        parents: [n] int64: of the drafts that were verified, -1: the last token said.
        confidence: [n] float64.
        path: [k] int64: those that held.
        num_levels: how deep was drafted, verified or not.
    """
    tried, held, verify_ms, pace = rule
    if not verify_ms.shape[0]:
        return
    size, num_held = parents.shape[0], path.shape[0]
    spent_ms = pace[FIRST_MS] + (num_levels - 1) * pace[LEVEL_MS] + pass_ms(verify_ms, size + 1)
    # A path leads from the root on, so one step along it is one node's turn.
    reached, is_asked = 0, False
    node = -1
    while True:
        following = path[reached] if reached < num_held else -2
        for i in range(node + 1, size):
            if parents[i] == node:
                at = bucket(confidence[i])
                tried[at] += 1.0
                held[at] += i == following
                is_asked = True
        if following == -2:
            break
        node, reached, is_asked = following, reached + 1, False
    if size:
        hit = num_held / (num_held + is_asked)
        pace[MEAN] += MEMORY * (hit - pace[MEAN])
    num_said = num_held + 1
    gain_ms = num_said * verify_ms[0] - spent_ms
    token_ms = pace[TOKEN_MS] + MEMORY * (spent_ms / num_said - pace[TOKEN_MS])
    pace[TOKEN_MS] = min(verify_ms[0], token_ms)
    pace[GAIN_MS] += 2.0 * MEMORY * (gain_ms - pace[GAIN_MS])
    if pace[GAIN_MS] < 0.0 and gain_ms < 0.0:
        # Ever longer rests for what does not pay, however often it is tried again.
        pace[LEFT] = pace[LENGTH]
        pace[LENGTH] = min(LONGEST_REST, 2.0 * pace[LENGTH])
        pace[GAIN_MS] = gain_ms / 2.0
    elif pace[GAIN_MS] >= 0.0 and gain_ms > 0.0:
        pace[LENGTH] = SHORTEST_REST

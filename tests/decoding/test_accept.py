from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.conftest import needs_gpu
from xsd.decoding.accept import (
    Draft,
    Sampling,
    accepted_prefix,
    choose_sampled,
    draw,
    residual,
    tau_from_prefix,
    verify,
)

tokens = st.lists(st.integers(0, 3), max_size=8)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=10))
def test_prefix_ends_at_the_first_miss(match: list[bool]) -> None:
    expected = match.index(False) if False in match else len(match)
    assert accepted_prefix(torch.tensor(match)).item() == expected


def test_prefix_keeps_leading_axes() -> None:
    match = torch.tensor([[[True, True, False], [False, True, True]]])
    assert accepted_prefix(match).tolist() == [[2, 0]]


@settings(deadline=None)
@given(tokens, st.data())
def test_greedy_output_is_the_verifiers(drafts: list[int], data: st.DataObject) -> None:
    n = len(drafts) + 1
    argmax = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    path, token = verify(Draft(drafts), argmax)
    accepted = len(path)
    assert path == list(range(accepted))
    assert [*drafts[:accepted], token] == argmax[: accepted + 1]
    assert accepted == len(drafts) or drafts[accepted] != argmax[accepted]


@st.composite
def trees(draw: st.DrawFn, distinct: bool = True) -> Draft:
    """Any tree of at most eight tokens of four; siblings differ if ``distinct``."""
    tokens: list[int] = []
    parents: list[int] = []
    for node in range(draw(st.integers(0, 8))):
        parent, token = draw(st.integers(-1, node - 1)), draw(st.integers(0, 3))
        if not distinct or (parent, token) not in zip(parents, tokens, strict=True):
            parents.append(min(parent, len(tokens) - 1))
            tokens.append(token)
    return Draft(tokens, parents)


@settings(deadline=None)
@given(trees(), st.data())
def test_greedy_walks_a_tree_as_far_as_the_verifier_agrees(
    draft: Draft, data: st.DataObject
) -> None:
    n = len(draft) + 1
    argmax = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    path, token = verify(draft, argmax)
    assert draft.parents is not None
    before = [-1, *path]
    assert [draft.parents[node] for node in path] == before[:-1]
    assert [draft.tokens[node] for node in path] == [argmax[node + 1] for node in before[:-1]]
    assert token == argmax[before[-1] + 1]
    assert token not in [draft.tokens[i] for i in draft.children(before[-1])]


@given(tokens, st.data())
def test_a_chain_is_the_tree_without_branches(drafts: list[int], data: st.DataObject) -> None:
    n = len(drafts) + 1
    argmax = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    tree = Draft(drafts, list(range(-1, n - 2)))
    assert verify(tree, argmax) == verify(Draft(drafts), argmax)
    assert tree.cut(2) == Draft(drafts[:2], list(range(-1, n - 2))[:2])


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 8))
def test_walk_emits_the_whole_answer(prefix: list[int], gamma: int) -> None:
    length = len(prefix)
    cycles, emitted = tau_from_prefix(prefix, gamma, length)
    assert emitted == length - 1
    assert -(-emitted // (gamma + 1)) <= cycles <= emitted


@pytest.mark.parametrize("gamma", [1, 3])
def test_walk_of_known_answers(gamma: int) -> None:
    assert tau_from_prefix([0] * 9, gamma, 9) == (8, 8)
    assert tau_from_prefix([99] * 9, gamma, 9) == (-(-8 // (gamma + 1)), 8)
    assert tau_from_prefix([5], gamma, 1) == (0, 0)


def test_walk_by_hand() -> None:
    # 0 known; +2+1 -> 3; +0+1 -> 4; +1+1 -> 6, the end.
    assert tau_from_prefix([2, 9, 9, 0, 1, 9, 9], 3, 7) == (3, 6)


probabilities = st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5).map(
    lambda x: torch.tensor(x) / sum(x)
)


@settings(deadline=None)
@given(probabilities, probabilities)
def test_accepted_and_residual_mass_add_up_to_p(p: torch.Tensor, q: torch.Tensor) -> None:
    """min(p,q) + P(reject) * residual = p: the identity that makes sampling lossless."""
    accepted = torch.minimum(p, q)
    torch.testing.assert_close(
        accepted + (1 - accepted.sum()) * residual(p, q), p, rtol=1e-4, atol=1e-5
    )


def test_residual_of_equals_is_p() -> None:
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(p, p), p)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-45, 1e-30, 1e-8, 0.3, 1.0]), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.5, 1.0 - 2.0**-53]),
)
def test_what_has_no_probability_is_never_drawn(p: list[float], chance: float) -> None:
    if any(p):
        token = draw(torch.tensor([p, p]), torch.full((2,), chance, dtype=torch.double)).tolist()
        assert token[0] == token[1] and p[token[0]] > 0


def test_a_token_is_drawn_where_its_share_of_the_numbers_lies() -> None:
    p, size = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25]), 1000
    chances = (torch.arange(size, dtype=torch.double) + 0.5) / size
    found = draw(p.expand(size, -1), chances)
    assert found.bincount(minlength=5).tolist() == [250, 0, 500, 0, 250]
    # Not normalised: only shares count. And rare tokens have numbers of their own.
    assert torch.equal(draw(3 * p.expand(size, -1), chances), found)
    rare = torch.full((1 << 16,), 2.0**-16)
    at = (torch.arange(1 << 16, dtype=torch.double) + 0.999) / (1 << 16)
    assert draw(rare.expand(3, -1), at[[0, 40_000, -1]]).tolist() == [0, 40_000, (1 << 16) - 1]


@settings(deadline=None)
@given(probabilities, st.floats(0.05, 1.0))
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(p: torch.Tensor, top_p: float) -> None:
    kept = Sampling(1.0, top_p).probabilities(p.log())
    assert float(kept.sum()) == pytest.approx(1.0, abs=1e-5)
    ranked = p.sort(descending=True).values.cumsum(0)
    num_kept = int((kept > 0).sum())
    assert num_kept == 1 or float(ranked[num_kept - 2]) < top_p + 1e-5
    assert float(ranked[num_kept - 1]) > top_p - 1e-5 or num_kept == 5
    torch.testing.assert_close(kept[kept > 0], (p / p[kept > 0].sum())[kept > 0])


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(
        Sampling(0.5).probabilities(logits), torch.softmax(2 * logits, dim=-1)
    )
    assert Sampling(0.01).probabilities(logits)[2] > 0.999


# ------------------------------------------------- what is said follows the verifier's distribution

VOCAB, LENGTH, NUM_TRIALS = 4, 2, 1500


class Language:
    """Random conditional distributions over a few tokens: a whole verifier, or a whole drafter."""

    def __init__(self, seed: int, sampling: Sampling, sharpness: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tables = [
            sampling.probabilities(sharpness * torch.randn(VOCAB**n, VOCAB, generator=generator))
            for n in range(LENGTH)
        ]

    def after(self, said: list[int]) -> torch.Tensor:
        index = 0
        for token in said:
            index = index * VOCAB + token
        return self.tables[len(said)][index]

    def answers(self) -> torch.Tensor:
        """[VOCAB ** LENGTH] probabilities of every answer, in order."""
        p = torch.ones(1)
        for table in self.tables:
            p = (p[:, None] * table).flatten()
        return p


def uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.double)


def drawn_from(p: torch.Tensor, generator: torch.Generator) -> int:
    return int(draw(p, uniform(generator)))


def verify_sampled(
    draft: Draft, p: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[list[int], int]:
    generator = generator or torch.Generator()
    chances = uniform(generator, len(draft) + 1, 2)
    ids = torch.tensor(draft.tokens)
    return verify(draft, choose_sampled(p, chances, ids, draft.q, draft.parents).tolist())


def drawn_chain(said: list[int], drafter: Language, generator: torch.Generator) -> Draft:
    tokens: list[int] = []
    rows = []
    while len(said) + len(tokens) < LENGTH:
        rows.append(drafter.after([*said, *tokens]))
        tokens.append(drawn_from(rows[-1], generator))
    return Draft(tokens, None, torch.stack(rows))


def chosen_chain(said: list[int], drafter: Language, _: torch.Generator) -> Draft:
    tokens: list[int] = []
    while len(said) + len(tokens) < LENGTH:
        tokens.append(int(drafter.after([*said, *tokens]).argmax()))
    return Draft(tokens)


def drawn_tree(said: list[int], drafter: Language, generator: torch.Generator) -> Draft:
    """Three independent draws a node (so siblings may be equal), as deep as there is room."""
    tokens: list[int] = []
    parents: list[int] = []
    rows = []
    paths = [list(said)]
    for node, path in enumerate(paths, start=-1):
        for _ in range(3 if len(path) < LENGTH and len(tokens) < 12 else 0):
            rows.append(drafter.after(path))
            tokens.append(drawn_from(rows[-1], generator))
            parents.append(node)
            paths.append([*path, tokens[-1]])
    return Draft(tokens, parents, torch.stack(rows))


def chosen_tree(said: list[int], drafter: Language, _: torch.Generator) -> Draft:
    """The two likeliest a node."""
    tokens: list[int] = []
    parents: list[int] = []
    paths = [list(said)]
    for node, path in enumerate(paths, start=-1):
        if len(path) < LENGTH:
            for token in drafter.after(path).topk(2).indices.tolist():
                tokens.append(token)
                parents.append(node)
                paths.append([*path, token])
    return Draft(tokens, parents)


Drafting = Callable[[list[int], Language, torch.Generator], Draft]


def speculated(
    drafting: Drafting, verifier: Language, drafter: Language, seed: int
) -> tuple[torch.Tensor, int]:
    """Counts of every answer over many runs, and how many drafts were accepted."""
    ours, theirs = (torch.Generator().manual_seed(seed + i) for i in (0, 1000))
    counts = torch.zeros(VOCAB**LENGTH)
    num_accepted = 0
    for _ in range(NUM_TRIALS):
        said: list[int] = []
        while len(said) < LENGTH:
            draft = drafting(said, drafter, theirs)
            ends: list[list[int]] = [said]
            for node, token in enumerate(draft.tokens):
                parent = node - 1 if draft.parents is None else draft.parents[node]
                ends.append([*ends[parent + 1], token])
            nothing = torch.full((VOCAB,), 1 / VOCAB)  # behind the end: cut away below
            p = torch.stack([verifier.after(end) if len(end) < LENGTH else nothing for end in ends])
            path, token = verify_sampled(draft, p, ours)
            num_accepted += len(path)
            said = [*said, *(draft.tokens[node] for node in path), token][:LENGTH]
        counts[said[0] * VOCAB + said[1]] += 1
    return counts, num_accepted


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """P(a statistic this large | the counts follow ``expected``); rare cells are pooled."""
    assert not counts[expected == 0].any(), "said what the verifier never says"
    expected = expected * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = torch.tensor(float(kept.sum() - 1))
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


SURE = 20.0
"""Logits so far apart that a drafter puts all its mass on one token, right or wrong."""


@pytest.mark.parametrize(
    ("sharpness", "top_p"), [(1.0, 0.7), (SURE, 1.0)], ids=["vague-top-p", "sure-and-wrong"]
)
@pytest.mark.parametrize("drafting", [drawn_chain, chosen_chain, drawn_tree, chosen_tree])
def test_speculative_sampling_is_sampling(
    drafting: Drafting, sharpness: float, top_p: float
) -> None:
    """Chi-square against the exact distribution of whole answers, seeds fixed."""
    verifier = Language(1, Sampling(0.8, top_p))
    drafter = Language(2, Sampling(), sharpness)
    counts, num_accepted = speculated(drafting, verifier, drafter, seed=3)
    assert num_accepted, "a test in which nothing is accepted shows nothing"
    assert chi_square_p(counts, verifier.answers()) > 0.01


def test_the_statistic_sees_a_wrong_rule() -> None:
    """Drawing from p instead of the residual is off by little, and found."""
    verifier, drafter = Language(1, Sampling(0.8)), Language(2, Sampling())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xsd.decoding.accept.residual", lambda p, q: p)
        counts, _ = speculated(drawn_chain, verifier, drafter, seed=3)
    assert chi_square_p(counts, verifier.answers()) < 1e-6


def test_sampling_extremes() -> None:
    one = torch.eye(3)
    assert verify_sampled(Draft([0, 1], None, one[:2]), one) == ([0, 1], 2)
    assert verify_sampled(Draft([0, 1], None, one[:2]), one[[0, 2, 1]]) == ([0], 2)
    tree = Draft([2, 0, 1], [-1, -1, 1])
    assert verify_sampled(tree, one[[0, 2, 1, 2]]) == ([1, 2], 2), "a miss, then two hits"


def any_rows(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Distributions that leave out some tokens."""
    rows = torch.rand(*shape, VOCAB, generator=generator).clamp(min=0.3) - 0.3
    rows[..., 0] += 0.1
    return rows / rows.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(5))
def test_drawn_chains_of_a_batch_are_judged_as_each_alone_and_as_trees_without_branches(
    seed: int,
) -> None:
    generator, batch, size = torch.Generator().manual_seed(seed), 50, 4
    p, q = (any_rows(generator, batch, n) for n in (size + 1, size))
    ids = draw(q, uniform(generator, batch, size))
    chances = uniform(generator, batch, size + 1, 2)
    together = choose_sampled(p, chances, ids, q)
    parents = list(range(-1, size - 1))
    for row in range(batch):
        given = p[row], chances[row], ids[row], q[row]
        assert torch.equal(choose_sampled(*given), together[row])
        assert torch.equal(choose_sampled(*given, parents), together[row])
    assert 0 < (together[:, :-1] == ids).float().mean() < 1
    # A draft that is not there, as where others of the batch have more.
    fits = torch.arange(size) < 2
    cut = choose_sampled(p, chances, ids, q * fits[:, None])
    short = choose_sampled(p[:, :3], chances[:, :3], ids[:, :2], q[:, :2])
    assert torch.equal(cut[:, :3], short)


def test_nothing_is_said_that_the_verifier_never_says() -> None:
    generator, size = torch.Generator().manual_seed(0), 200
    p, q = (any_rows(generator, n) for n in (size + 1, size))
    for drafts in (None, draw(q, uniform(generator, size))):
        said = choose_sampled(p, uniform(generator, size + 1, 2), drafts, q)
        assert (p.gather(-1, said[:, None]) > 0).all()


def test_a_draft_drawn_from_the_verifiers_own_distribution_always_holds() -> None:
    generator, size = torch.Generator().manual_seed(0), 200
    p = any_rows(generator, size + 1)
    ids = draw(p[:-1], uniform(generator, size))
    said = choose_sampled(p, uniform(generator, size + 1, 2), ids, p[:-1])
    assert torch.equal(said[:-1], ids)


def test_what_refused_a_draft_does_not_draw_the_token_in_its_place() -> None:
    """The number is known to be large by then: of what is left, the last tokens would be drawn."""
    size, vocab = 20_000, 8
    p, q = torch.full((size + 1, vocab), 1 / vocab), torch.zeros(size, vocab)
    q[:, 0] = 1.0
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(size, dtype=torch.long)
    said = choose_sampled(p, uniform(generator, size + 1, 2), ids, q)[:-1]
    assert chi_square_p(said.bincount(minlength=vocab).float(), p[0]) > 0.01


@needs_gpu
@pytest.mark.parametrize("kind", ["chosen", "chain", "tree"])
def test_judging_waits_for_no_gpu_and_says_what_a_cpu_says(kind: str) -> None:
    """Of a large vocabulary, most of which is never said; rounding decides of nothing here."""
    generator, size, vocab = torch.Generator().manual_seed(0), 12, 32_064
    logits = 3.0 * torch.randn(2 * size + 1, vocab, generator=generator)
    p, q = Sampling(1.0, 0.8).probabilities(logits).split([size + 1, size])
    q = 0.5 * q + 0.5 * p[:-1]
    ids = draw(q, uniform(generator, size))
    drafts = (None, None) if kind == "chosen" else (ids, q)
    parents = [-1, -1, -1, 0, 0, 1, 3, 3, 3, 5, 6, 6] if kind == "tree" else None
    given = p, uniform(generator, size + 1, 2), *drafts
    there = [None if x is None else x.cuda() for x in given]
    choose_sampled(*there, parents)
    torch.cuda.set_sync_debug_mode("error")
    try:
        said = choose_sampled(*there, parents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert said.tolist() == choose_sampled(*given, parents).tolist()


@needs_gpu
def test_a_gpu_draws_nothing_that_has_no_probability() -> None:
    """Also by numbers at which one token's share ends and another's begins."""
    generator, size, vocab = torch.Generator().manual_seed(0), 512, 32_064
    p = Sampling(1.0, 0.5).probabilities(torch.randn(vocab, generator=generator)).cuda()
    mass = p.cumsum(-1, dtype=torch.double)
    edges = (mass / mass[-1])[:: vocab // size].clamp(max=1.0 - 2.0**-53)
    said = draw(p.expand(len(edges), -1), edges)
    assert (p[said] > 0).all()

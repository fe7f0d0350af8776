from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.decoding.accept import (
    accepted_prefix,
    residual,
    tau_from_prefix,
    verify_greedy,
    verify_sampled,
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
    accepted, token = verify_greedy(drafts, argmax)
    assert [*drafts[:accepted], token] == argmax[: accepted + 1]
    assert accepted == len(drafts) or drafts[accepted] != argmax[accepted]


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


def test_sampled_tokens_follow_the_verifier() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]])
    q = torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    num_trials, first, second = 6000, torch.zeros(4), torch.zeros(4)
    num_accepted = 0
    for draft in torch.multinomial(q[0], num_trials, replacement=True, generator=generator):
        accepted, token = verify_sampled([int(draft)], q, p, generator)
        num_accepted += accepted
        first[int(draft) if accepted else token] += 1
        if accepted:
            second[token] += 1
    # Acceptance: sum of min(p, q) = 0.6. Four standard errors everywhere.
    assert num_accepted / num_trials == pytest.approx(0.6, abs=0.026)
    torch.testing.assert_close(first / num_trials, p[0], rtol=0, atol=0.026)
    torch.testing.assert_close(second / num_accepted, p[1], rtol=0, atol=0.034)


def test_sampling_extremes() -> None:
    one = torch.eye(3)
    assert verify_sampled([0, 1], one[:2], one) == (2, 2)
    assert verify_sampled([0, 1], one[:2], one[[0, 2, 1]]) == (1, 2)

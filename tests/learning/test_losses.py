from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.adapters.conftest import D_VERIFIER, make_adapter, make_streams
from xsd.adapters.catalog import LEVELS
from xsd.learning import losses
from xsd.learning.losses import adapter_loss, eagle_loss, feature_loss, token_loss

LM_HEAD = torch.randn(50, D_VERIFIER, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def streams():  # type: ignore[no-untyped-def]
    return make_streams()


def reference_token_loss(chain, target, mask, shift, lm_head):  # type: ignore[no-untyped-def]
    """Position by position, as the definition reads."""
    total = torch.zeros((), dtype=target.dtype)
    for k, out in enumerate(chain):
        terms = []
        for b in range(target.shape[0]):
            for t in range(target.shape[1] - shift - k):
                if mask[b, t + shift + k]:
                    p = (lm_head @ target[b, t + shift + k]).softmax(0)
                    q = (lm_head @ out[b, t]).softmax(0)
                    terms.append((p * (p / q).log()).sum())
        total = total + 0.8**k * torch.stack(terms).mean()
    return total


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("rows", [1, 4, 1 << 20])
def test_token_loss_and_gradient(streams, shift, rows, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(losses, "ROWS", rows)
    target, lm_head = streams.verifier.double(), LM_HEAD.double()
    chain = [torch.randn_like(target).requires_grad_() for _ in range(3)]
    ours = token_loss(chain, target, streams.mask, shift, lm_head)
    reference = reference_token_loss(chain, target, streams.mask, shift, lm_head)
    torch.testing.assert_close(ours, reference)
    for a, b in zip(
        torch.autograd.grad(2 * ours, chain), torch.autograd.grad(2 * reference, chain), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_perfect_chain_has_no_token_loss(streams) -> None:  # type: ignore[no-untyped-def]
    loss = token_loss([streams.verifier], streams.verifier, streams.mask, 0, LM_HEAD)
    assert loss.abs() < 1e-5


def test_chain_longer_than_the_answers_is_finite(streams) -> None:  # type: ignore[no-untyped-def]
    chain = [torch.randn_like(streams.verifier) for _ in range(12)]
    assert token_loss(chain, streams.verifier, streams.mask, 1, LM_HEAD).isfinite()


def test_feature_loss_is_the_seeds(streams) -> None:  # type: ignore[no-untyped-def]
    out = torch.randn_like(streams.verifier)
    real, target = out[streams.mask], streams.verifier[streams.mask]
    expected = (real - target).square().mean()
    expected = expected + 0.5 * (1 - cosine_similarity(real, target, dim=-1).mean())
    torch.testing.assert_close(feature_loss(out, streams.verifier, streams.mask), expected)


def test_eagle_loss_is_half_align_half_predict(streams) -> None:  # type: ignore[no-untyped-def]
    out = torch.randn_like(streams.verifier)
    both = streams.mask[:, 1:]
    predict = (out[:, :-1][both] - streams.verifier[:, 1:][both]).square().mean()
    expected = 0.5 * feature_loss(out, streams.verifier, streams.mask) + 0.5 * predict
    torch.testing.assert_close(eagle_loss(out, streams.verifier, streams.mask), expected)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("kind", ["feature", "token", None])
def test_padding_never_reaches_the_loss(name, kind, streams) -> None:  # type: ignore[no-untyped-def]
    adapter = make_adapter(name)
    noise = {
        n: torch.where(streams.mask[..., None], getattr(streams, n), 7.0)
        for n in ("drafter", "verifier", "token")
    }
    values = [
        adapter_loss(adapter, s, loss=kind, unroll_steps=3, lm_head=LM_HEAD)
        for s in (streams, replace(streams, **noise))
    ]
    torch.testing.assert_close(*values)

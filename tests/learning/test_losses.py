from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.adapters.conftest import D_VERIFIER, make_adapter, make_streams
from xsd.adapters.base import Streams
from xsd.adapters.catalog import LEVELS
from xsd.learning import losses
from xsd.learning.losses import Weights, adapter_loss, eagle_loss, feature_loss, token_loss

LM_HEAD = torch.randn(50, D_VERIFIER, generator=torch.Generator().manual_seed(3))


def packed(streams, x):  # type: ignore[no-untyped-def]
    """Rows of the real positions."""
    return x[streams.mask]


def weights(streams):  # type: ignore[no-untyped-def]
    layout = streams.packed()[1]
    return Weights(layout, layout.lengths)


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
    rows = [packed(streams, out) for out in chain]
    ours = token_loss(rows, packed(streams, target), weights(streams), shift, lm_head)
    reference = reference_token_loss(chain, target, streams.mask, shift, lm_head)
    torch.testing.assert_close(ours, reference)
    for a, b in zip(
        torch.autograd.grad(2 * ours, chain), torch.autograd.grad(2 * reference, chain), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_perfect_chain_has_no_token_loss(streams) -> None:  # type: ignore[no-untyped-def]
    target = packed(streams, streams.verifier)
    loss = token_loss([target], target, weights(streams), 0, LM_HEAD)
    assert loss.abs() < 1e-5


def test_chain_longer_than_the_answers_is_finite(streams) -> None:  # type: ignore[no-untyped-def]
    target = packed(streams, streams.verifier)
    chain = [torch.randn_like(target) for _ in range(12)]
    assert token_loss(chain, target, weights(streams), 1, LM_HEAD).isfinite()


def test_feature_loss_is_the_seeds(streams) -> None:  # type: ignore[no-untyped-def]
    out = torch.randn_like(streams.verifier)
    real, target = out[streams.mask], streams.verifier[streams.mask]
    expected = (real - target).square().mean()
    expected = expected + 0.5 * (1 - cosine_similarity(real, target, dim=-1).mean())
    torch.testing.assert_close(feature_loss(real, target, weights(streams), 0), expected)


def test_eagle_loss_is_half_align_half_predict(streams) -> None:  # type: ignore[no-untyped-def]
    out = torch.randn_like(streams.verifier)
    both = streams.mask[:, 1:]
    predict = (out[:, :-1][both] - streams.verifier[:, 1:][both]).square().mean()
    rows = packed(streams, out), packed(streams, streams.verifier), weights(streams)
    expected = 0.5 * feature_loss(*rows, 0) + 0.5 * predict
    torch.testing.assert_close(eagle_loss(*rows), expected)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("kind", ["feature", "token"])
def test_shares_of_a_batch_add_up(name, kind, streams) -> None:  # type: ignore[no-untyped-def]
    adapter, lengths = make_adapter(name), streams.packed()[1].lengths

    def loss(which: list[int]) -> Tensor:
        held = {f.name: getattr(streams, f.name) for f in fields(streams) if f.name != "layout"}
        share = Streams(**{name: x[which] for name, x in held.items()})
        return adapter_loss(
            adapter, share, loss=kind, unroll_steps=3, lm_head=LM_HEAD, lengths=lengths
        )

    torch.testing.assert_close(loss([0, 2]) + loss([1]), loss([0, 1, 2]))


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

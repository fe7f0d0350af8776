"""The operations of a CPU's training are PyTorch's own, up to rounding and to chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, scaled_dot_product_attention

from tests.adapters.conftest import make_adapter, make_streams
from xsd.adapters.catalog import LEVELS
from xsd.learning import cpu
from xsd.learning.cpu import CpuOps, product


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), leaves)


@pytest.mark.parametrize("shape", [(7, 6), (1, 5, 6)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(shape, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    bias = torch.randn(4, requires_grad=True) if with_bias else None
    leaves = [x for x in (rows, weight, bias) if x is not None]
    expected = linear(rows, weight, bias)
    with CpuOps():
        found = linear(rows, weight, bias)
    assert found.grad_fn.name() == "_LinearBackward"  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LEVELS)
def test_levels_and_their_gradients(name: str) -> None:
    adapter, streams = make_adapter(name), make_streams()
    found = []
    for mode in (CpuOps(), torch.enable_grad()):
        with mode:
            loss = sum(out.square().mean() for out in adapter.unroll(streams, 3))
        assert isinstance(loss, Tensor)
        found.append(torch.autograd.grad(loss, list(adapter.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_onednn_products_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_product", None)
    rows, weight = torch.randn(3, 6), torch.randn(4, 6)
    assert torch.equal(product(rows, weight), linear(rows, weight))
    assert product(rows.double(), weight.double()).dtype == torch.double


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_and_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 401, requires_grad=True)
    with CpuOps():
        out = nn.Dropout(rate)(x)
    kept = out != 0
    # Five standard deviations.
    assert abs(kept.float().mean() - (1 - rate)) < 5 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert torch.allclose(out[kept], torch.tensor(1 / (1 - rate)), rtol=1e-4)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, out)
    # Neighbours come out of one number; they must not know of each other.
    both = (kept[:, :-1] & kept[:, 1:]).float().mean()
    assert abs(both - (1 - rate) ** 2) < 0.01


def test_dropout_follows_the_seed_and_can_be_off() -> None:
    x = torch.ones(40, 40)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with CpuOps():
            drawn.append(dropout(x, 0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with CpuOps():
        assert torch.equal(dropout(x, 0.5, training=False), x)


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_with_dropout_is_attention_on_average(is_causal: bool) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, 2, 2, 5, 8)
    expected = scaled_dot_product_attention(query, keys, values, is_causal=is_causal)
    with CpuOps():
        many = [
            scaled_dot_product_attention(query, keys, values, None, 0.2, is_causal)
            for _ in range(2000)
        ]
        plain = scaled_dot_product_attention(query, keys, values, is_causal=is_causal)
    torch.testing.assert_close(torch.stack(many).mean(0), expected, rtol=0.1, atol=0.1)
    assert torch.equal(plain, expected)


def test_it_ends_with_the_block() -> None:
    rows, weight = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6)
    with CpuOps():
        pass
    assert linear(rows, weight).grad_fn.name() != "_LinearBackward"  # type: ignore[union-attr]


def test_slices_of_a_matrix_are_products_like_others() -> None:
    rows, weight = torch.randn(5, 6), torch.randn(4, 12)
    for part in (weight[:, :6], weight[:, 6:], torch.randn(12, 4)[6:].mT):
        torch.testing.assert_close(product(rows, part), linear(rows, part))

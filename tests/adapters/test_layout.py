"""Packed answers, and their padded form."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from xsd.adapters.layout import Layout


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.integers(0, 3))
def test_padding_and_back(lengths: list[int], more: int) -> None:
    layout = Layout(lengths, max(lengths) + more)
    rows = torch.arange(1.0, sum(lengths) + 1)[:, None].repeat(1, 2)
    padded = layout.pad(rows)
    assert padded.shape == (len(lengths), max(lengths) + more, 2)
    first = 0
    for answer, length in zip(padded, lengths, strict=True):
        assert torch.equal(answer[:length], rows[first : first + length])
        assert not answer[length:].any()
        assert layout.positions[first : first + length].tolist() == list(range(length))
        assert layout.remaining[first : first + length].tolist() == list(range(length, 0, -1))
        first += length
    assert torch.equal(layout.unpad(padded), rows)


def test_gradients() -> None:
    layout = Layout([2, 4, 1])
    rows = torch.randn(7, 3, dtype=torch.double, requires_grad=True)
    padded = torch.randn(3, 4, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pad, rows)
    assert torch.autograd.gradcheck(layout.unpad, padded)

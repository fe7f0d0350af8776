"""Launches fit their chip, and are those that were measured where they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsd.pairs.launch import Chip, HeadShape, plan_attention, plan_projection, power_from

H200 = Chip(132, 232448)
CHIPS = [H200, Chip(108, 166912), Chip(82, 101376)]
SEVEN_B = HeadShape(32, 32, 128)


@pytest.mark.parametrize("chip", CHIPS)
@given(
    num_rows=st.integers(1, 64),
    num_outs=st.integers(1, 40000),
    gated=st.booleans(),
)
def test_products_fit(chip: Chip, num_rows: int, num_outs: int, gated: bool) -> None:
    plan = plan_projection(num_rows, num_outs, chip, gated)
    assert plan.rows >= num_rows and plan.rows < max(17, 2 * num_rows)
    bytes_a_stage = 2 * plan.step * (plan.rows + plan.outs * (1 + gated))
    assert bytes_a_stage * plan.num_stages <= chip.shared_bytes
    assert plan.step >= 16 and plan.num_stages >= 2
    if plan.outs > 16:
        assert -(-num_outs // plan.outs) >= chip.num_processors / 4


@pytest.mark.parametrize("chip", CHIPS)
@given(
    num_rows=st.integers(1, 64),
    kv_heads=st.sampled_from([1, 2, 4, 8, 32]),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([12, 64, 80, 128]),
)
def test_attention_fits(
    chip: Chip, num_rows: int, kv_heads: int, group: int, head_dim: int
) -> None:
    shape = HeadShape(kv_heads * group, kv_heads, head_dim)
    for is_exact in (False, True):
        plan = plan_attention(num_rows, shape, chip, is_exact)
        width = max(16, power_from(head_dim))
        size = 4 if is_exact else 2
        needed = size * width * (2 * plan.columns * plan.num_stages + plan.tile)
        assert needed <= chip.shared_bytes
        tiles = -(-num_rows * group // plan.tile)
        assert plan.num_splits == 1 or plan.num_splits * tiles * kv_heads <= chip.num_processors


def test_full_size_is_launched_as_it_was_fastest() -> None:
    for num_rows in (1, 22):
        wide = plan_projection(num_rows, 12288, H200, gated=False)
        gate_up = plan_projection(num_rows, 11008, H200, gated=True)
        narrow = plan_projection(num_rows, 4096, H200, gated=False)
        assert wide[1:] == (128, 128, 8, 4) and gate_up[1:] == (128, 128, 8, 3)
        assert narrow[1:] == (64, 128, 4, 6)
    assert plan_projection(64, 11008, H200, gated=True)[1:] == (128, 64, 8, 4)
    assert plan_attention(1, SEVEN_B, H200, is_exact=False) == (16, 128, 4, 8, 3)
    assert plan_attention(64, SEVEN_B, H200, is_exact=False) == (64, 128, 4, 8, 3)


def test_powers() -> None:
    assert [power_from(n) for n in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128]

"""Weights of drafts are rounded to bfloat16, and nothing else happens to them."""

from __future__ import annotations

from itertools import product as product_of
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.conftest import make_adapter
from xsd import kernels
from xsd.adapters.compiled import CompiledCache, Shape, Vocabulary
from xsd.decoding.policy import Policy
from xsd.kernels.options import exact
from xsd.kernels.products import add_product


@exact
def product(x: Any, panels: Any, out: Any) -> None:
    add_product(x, panels, out)


@pytest.mark.parametrize("depth", [2, 37, 128])
@pytest.mark.parametrize("num_rows", range(1, 14))
def test_a_product_is_that_of_the_rounded_weights(num_rows: int, depth: int) -> None:
    """To the bit, for any number of rows."""
    random = np.random.default_rng(depth)
    panels = kernels.pack(random.standard_normal((depth, 200)).astype(np.float32))
    rounded = torch.from_numpy(panels).bfloat16().float().numpy()
    halved = kernels.halve(panels)
    assert halved.dtype == np.uint32 and halved.shape == (4, -(-depth // 2), 64)
    # Behind an odd depth there is one number more, which counts for nothing.
    x = random.standard_normal((num_rows, depth + 1)).astype(np.float32)
    outs = [np.ones((num_rows, 256), np.float32) for _ in range(3)]
    for weights, out in zip((halved, rounded, panels), outs, strict=True):
        product(x, weights, out)
    assert np.array_equal(outs[0], outs[1])
    assert not np.array_equal(outs[0], outs[2])


@pytest.mark.parametrize(("level", "width"), [("B1", 1), *product_of(("E1", "E3", "text"), (1, 2))])
def test_drafts_are_those_of_the_rounded_weights(
    level: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded before they are packed as they are, or halved: the same tokens, just as sure."""
    random = np.random.default_rng(0)
    adapter = make_adapter(level)
    dim = adapter.config.d_verifier
    table = random.standard_normal((30, dim)).astype(np.float32)
    lm_head = kernels.pack(random.standard_normal((dim, 30)).astype(np.float32))
    states = torch.from_numpy(random.standard_normal((5, dim)).astype(np.float32))
    visual = torch.from_numpy(random.standard_normal((1, 7, dim)).astype(np.float32))
    halve = kernels.halve

    def rounded(panels: np.ndarray) -> np.ndarray:
        return torch.from_numpy(panels).bfloat16().float().numpy()

    found = []
    for store in (halve, rounded):
        monkeypatch.setattr(kernels, "halve", store)
        made = make_adapter(level)
        made.load_state_dict(adapter.state_dict())
        cache = made.new_cache(1, 24, visual if made.memory == "visual" else None)
        assert isinstance(cache, CompiledCache)
        words = Vocabulary(table, store(lm_head), 30, np.zeros(0, np.int64))
        drafts = []
        for start, said in ((0, [3, 1, 4]), (3, [1, 5])):
            cache.length = start
            shape = Shape(gamma=4, width=width)
            drafts.append(cache.draft(said, states[: len(said)], words, shape, Policy.rule))
        found.append(drafts)
    for halved, plain in zip(*found, strict=True):
        assert halved.tokens.tolist() == plain.tokens.tolist()
        assert halved.parents.tolist() == plain.parents.tolist()
        assert np.array_equal(halved.confidence, plain.confidence)


def test_steps_that_metrics_follow_keep_all_their_digits() -> None:
    head = make_adapter("E1").new_cache(1, 9).head  # type: ignore[union-attr]
    assert all(weight.dtype == np.float32 for weight in head.weights)
    assert all(weight.dtype == np.uint32 for weight in head.arguments[: len(head.weights)])

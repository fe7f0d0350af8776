"""Compiled passes: the same numbers whatever goes through together."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from numba.core.errors import TypingError
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from xsd import kernels
from xsd.kernels import rows as rows_module
from xsd.kernels.waiting import wait_for
from xsd.pairs.cache import KVCache, TreeRows
from xsd.pairs.choose import Chooser
from xsd.pairs.crew import Crew
from xsd.pairs.step import DecoderStack
from xsd.pairs.vision import CompiledProjector, CompiledTower, clip_features, features_of

WIDTH, MAX_LENGTH = 48, 160


@pytest.fixture
def stack() -> DecoderStack:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        vocab_size=50,
        initializer_range=0.2,
    )
    made = DecoderStack(LlamaModel(config).eval())
    assert made.compiled is not None
    return made


def rows(num_rows: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, num_rows, WIDTH, generator=torch.Generator().manual_seed(1))


def run(stack: DecoderStack, x: Tensor, sizes: list[int], cache: KVCache | None = None) -> Tensor:
    cache = cache or stack.new_cache(x.shape[0], MAX_LENGTH)
    bounds = [0, *accumulate(sizes)]
    return torch.cat([stack.forward(x[:, a:b], cache) for a, b in pairwise(bounds)], dim=1)


@pytest.mark.parametrize("sizes", [[14], [2] * 7, [3, 4, 7], [5, 9], [6, 8], [10, 4]])
def test_a_row_is_the_same_to_the_last_bit_whatever_goes_with_it(
    stack: DecoderStack, sizes: list[int]
) -> None:
    x = rows(14)
    assert torch.equal(run(stack, x, sizes), run(stack, x, [1] * 14))


@pytest.mark.parametrize("batch", [1, 3])
def test_cores_share_out_the_layers_and_change_nothing(stack: DecoderStack, batch: int) -> None:
    x, found = rows(130, batch), []
    assert stack.compiled is not None
    for num_cores in (1, 2, 3, 8):
        stack.compiled.num_cores = num_cores
        found.append(run(stack, x, [100, 30]))
    assert all(torch.equal(found[0], other) for other in found[1:])
    torch.testing.assert_close(found[0], run(stack, x, [1] * 130), rtol=0, atol=0)


@pytest.mark.parametrize("num_states", [1, 7, 40, 130])
@pytest.mark.parametrize("batch", [1, 3])
def test_states_that_nobody_reads_change_nothing(
    stack: DecoderStack, batch: int, num_states: int
) -> None:
    """Of a prefill whose last layer makes keys and values only, but for the rows that are read."""
    x, more = rows(130, batch), rows(5, batch)
    assert stack.compiled is not None
    whole = stack.new_cache(batch, MAX_LENGTH)
    states, after = stack.forward(x, whole), stack.forward(more, whole)
    for num_cores in (1, 2, 5):
        stack.compiled.num_cores = num_cores
        cache = stack.new_cache(batch, MAX_LENGTH)
        assert torch.equal(stack.forward(x, cache, num_states), states[:, -num_states:])
        assert torch.equal(stack.forward(more, cache), after)


def test_a_core_that_fails_lets_the_others_go(
    stack: DecoderStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = kernels.share_of_pass

    def fails(core: int, *rest: object) -> None:
        if core == 1:
            raise MemoryError("no room")
        works(core, *rest)

    assert stack.compiled is not None
    stack.compiled.num_cores = 3
    monkeypatch.setattr(kernels, "share_of_pass", fails, raising=False)
    with pytest.raises(MemoryError, match="no room"):
        run(stack, rows(130), [130])


@pytest.mark.parametrize(("found", "is_there"), [(3, True), (4, True), (kernels.ABANDONED, False)])
def test_a_core_waits_until_a_number_is_reached_or_given_up(found: int, is_there: bool) -> None:
    assert wait_for(np.array([0, found]), 1, 3) is is_there


def test_a_branch_of_a_tree_is_a_chain_to_the_last_bit(stack: DecoderStack) -> None:
    """Root, two children, and a grandchild behind the second."""
    x = rows(20)
    parents = [-1, 0, 0, 2]
    ancestors = torch.zeros(4, 4, dtype=torch.bool)
    for row, parent in enumerate(parents):
        ancestors[row, row] = True
        if parent >= 0:
            ancestors[row] |= ancestors[parent]
    cache = stack.new_cache(1, MAX_LENGTH)
    stack.forward(x[:, :16], cache)
    cache.tree = TreeRows(torch.tensor([0, 1, 1, 2]), ancestors)
    grown = stack.forward(x[:, 16:], cache)[0]
    for branch in ([0, 1], [0, 2, 3]):
        chain = torch.cat([x[:, :16], x[:, [16 + row for row in branch]]], dim=1)
        said = run(stack, chain, [16, len(branch)])[0, 16:]
        assert torch.equal(grown[branch], said)


@pytest.mark.parametrize("num_ids", [1, 63, 64, 100])
def test_the_likeliest_token_is_that_of_the_lm_head(num_ids: int) -> None:
    head = nn.Linear(WIDTH, num_ids, bias=False)
    states = rows(7)[0]
    with torch.inference_mode():
        assert Chooser(head)(states) == head(states).argmax(-1).tolist()
        # Seen at a stride, and alone.
        assert Chooser(head)(states[::2]) == Chooser(head)(states)[::2]
        assert [Chooser(head)(state)[0] for state in states] == Chooser(head)(states)


def test_of_equal_logits_the_first_is_chosen_and_nan_is_no_endless_search() -> None:
    head = nn.Linear(WIDTH, 10, bias=False)
    nn.init.zeros_(head.weight)
    choose = Chooser(head)
    assert choose(rows(2)[0]) == [0, 0]
    assert 0 <= choose(torch.full((1, WIDTH), torch.nan))[0] < 10


def test_what_is_not_contiguous_is_refused() -> None:
    panels = kernels.pack(np.ones((WIDTH, 8), np.float32))
    with pytest.raises(TypingError, match="C-contiguous"):
        kernels.choose(np.ones((4, 2 * WIDTH), np.float32)[:, ::2], panels, 8, np.zeros(4, int))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_a_compiled_tower_sees_what_its_modules_see(layer: int, activation: str) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=24,
        patch_size=8,
        hidden_act=activation,
        initializer_range=0.3,
    )
    tower = CLIPVisionModel(config).eval()
    for name, weight in tower.named_parameters():
        if "bias" in name or "norm" in name:
            nn.init.normal_(weight, mean=1.0)
    features = features_of(tower, layer)
    assert isinstance(features, CompiledTower)
    pixels = torch.randn(5, 3, 24, 24)
    with torch.inference_mode():
        expected = clip_features(tower, pixels, layer)
    found = features(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)
    features.crew.num_cores = 3
    assert torch.equal(features(pixels), found)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_compiled_projector_is_its_modules(activation: str) -> None:
    torch.manual_seed(0)
    maps = nn.Linear(36, 100), nn.Linear(100, 70)
    features = torch.randn(3, 17, 36)
    assert CompiledProjector.takes(maps[0], activation, maps[1])
    crew = Crew()
    project = CompiledProjector(maps[0], activation, maps[1], crew)
    with torch.inference_mode():
        expected = maps[1](getattr(nn.functional, activation)(maps[0](features)))
    found = project(features)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    crew.num_cores = 2
    assert torch.equal(project(features), found)
    assert not CompiledProjector.takes(maps[0].half(), activation, maps[1])


def test_a_tower_in_reduced_precision_stays_its_modules() -> None:
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=24, num_attention_heads=2)).half()
    assert not isinstance(features_of(tower, -1), CompiledTower)


def test_tokens_go_in_and_choices_come_out_as_by_the_parts(stack: DecoderStack) -> None:
    torch.manual_seed(2)
    table, head = torch.randn(50, WIDTH), nn.Linear(WIDTH, 70, bias=False)
    choose, compiled = Chooser(head), stack.compiled
    assert compiled is not None and choose.panels is not None
    apart, together = (stack.new_cache(1, MAX_LENGTH) for _ in range(2))
    for ids in ([3, 49, 0], [7], [1, 2, 3, 4, 5, 6, 7]):
        expected = stack.forward(table[ids][None], apart)[0]
        states, chosen = compiled.read(ids, table.numpy(), choose.panels, 70, together)
        assert torch.equal(states, expected)
        assert chosen.tolist() == choose(expected)
    length = together.length
    for stranger in (50, -1):
        with pytest.raises(AssertionError, match="none of 50"):
            compiled.read([0, stranger], table.numpy(), choose.panels, 70, together)
    assert together.length == length


def test_gelu_is_that_of_double_precision() -> None:
    x = torch.linspace(-12, 12, 5001)
    found = x.clone()
    rows_module.gelu(found.numpy())
    expected = nn.functional.gelu(x.double()).float()
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-7)

"""``DecoderStack`` on its cache against transformers' ``LlamaModel`` without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from xsd.pairs.cache import KVCache
from xsd.pairs.step import DecoderStack

WIDTH, MAX_LENGTH = 48, 40


@pytest.fixture(autouse=True, params=[torch.float32, torch.float64], ids=["compiled", "modules"])
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Single precision takes the compiled passes, any other the modules'."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(params=["multi-head", "grouped-query", "one-kv-head", "wide-heads"])
def model(request: pytest.FixtureRequest, precision: None) -> LlamaModel:
    heads, kv_heads, head_dim = {
        "multi-head": (4, 4, 12),
        "grouped-query": (4, 2, 12),
        "one-kv-head": (4, 1, 12),
        "wide-heads": (4, 2, 20),
    }[request.param]
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=50,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def reference(model: LlamaModel, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(inputs_embeds=x, use_cache=False).last_hidden_state


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def rows(num: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, num, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_the_models_own_forward_is_unchanged_by_fusing(model: LlamaModel) -> None:
    x = rows(9)
    before = reference(model, x)
    DecoderStack(model)
    close(reference(model, x), before)


def test_single_precision_takes_compiled_passes(model: LlamaModel) -> None:
    compiles = torch.get_default_dtype() == torch.float32
    assert (DecoderStack(model).compiled is not None) is compiles


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill(model: LlamaModel, batch: int) -> None:
    x = rows(11, batch)
    expected = reference(model, x)
    stack = DecoderStack(model)
    cache = stack.new_cache(batch, MAX_LENGTH)
    close(stack.forward(x, cache), expected)
    assert cache.length == 11


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("split", [[7, 1, 1, 1, 1], [7, 4], [1] * 11, [5, 1, 3, 2], [3, 8]])
def test_cached_rows(model: LlamaModel, split: list[int], batch: int) -> None:
    x = rows(sum(split), batch)
    expected = reference(model, x)
    stack = DecoderStack(model)
    cache = stack.new_cache(batch, MAX_LENGTH)
    close(torch.cat([stack.forward(part, cache) for part in x.split(split, 1)], 1), expected)


def test_rollback_leaves_no_trace(model: LlamaModel) -> None:
    x, rejected = rows(12), rows(6, seed=2)
    expected = reference(model, x)
    stack = DecoderStack(model)
    cache = stack.new_cache(1, MAX_LENGTH)
    stack.forward(x[:, :7], cache)
    stack.forward(torch.cat([x[:, 7:8], rejected], 1), cache)
    cache.length = 8
    close(stack.forward(x[:, 8:9], cache), expected[:, 8:9])
    close(stack.forward(x[:, 9:], cache), expected[:, 9:])


def test_a_full_cache_takes_rows_to_its_last_position(model: LlamaModel) -> None:
    x = rows(8)
    expected = reference(model, x)
    stack = DecoderStack(model)
    cache = stack.new_cache(1, 8)
    stack.forward(x[:, :7], cache)
    close(stack.forward(x[:, 7:], cache), expected[:, 7:])
    with pytest.raises(AssertionError, match="8 positions, 9 needed"):
        stack.forward(x[:, :1], cache)


@pytest.mark.parametrize("split", [[12], [8, 1, 1, 2], [8, 4], [9, 3]])
def test_left_padded_batch(model: LlamaModel, split: list[int]) -> None:
    pads = [0, 3, 7]
    x = rows(12, batch=3)
    expected = [reference(model, x[b : b + 1, pad:]) for b, pad in enumerate(pads)]
    stack = DecoderStack(model)
    cache = stack.new_cache(3, MAX_LENGTH)
    cache.pad = torch.tensor(pads)
    actual = torch.cat([stack.forward(part, cache) for part in x.split(split, 1)], 1)
    assert actual.isfinite().all()
    for b, pad in enumerate(pads):
        close(actual[b : b + 1, pad:], expected[b])


def test_retired_rows_leave_the_others_unchanged(model: LlamaModel) -> None:
    x = rows(9, batch=3)
    stack = DecoderStack(model)
    cache = stack.new_cache(3, MAX_LENGTH)
    cache.pad = torch.tensor([0, 2, 4])
    stack.forward(x[:, :8], cache)
    expected = stack.forward(x[:, 8:], cache)
    left = [0, 1, 2]
    for going in ([1, 2], [0]):
        cache.length = 8
        order = cache.retire(going)
        assert sorted(order) == going and cache.batch == len(going)
        left = [left[row] for row in order]
        close(stack.forward(x[left, 8:], cache), expected[left])
    assert left == [2]


def test_a_shared_prefix_starts_every_row(model: LlamaModel) -> None:
    x = rows(10, batch=3)
    x[:, :6] = x[:1, :6]
    expected = reference(model, x)
    stack = DecoderStack(model)
    prefix = stack.new_cache(1, 6)
    stack.forward(x[:1, :6], prefix)
    cache: KVCache = stack.new_cache(3, MAX_LENGTH)
    cache.expand_from(prefix)
    close(stack.forward(x[:, 6:], cache), expected[:, 6:])


def test_padding_stands_behind_a_shared_prefix(model: LlamaModel) -> None:
    x, pads = rows(11, batch=4), [0, 4, 2, 5]
    x[:2, :6], x[2:, :6] = x[:1, :6].clone(), x[2:3, :6].clone()
    stack = DecoderStack(model)
    prefixes = stack.new_cache(2, 6)
    stack.forward(x[::2, :6], prefixes)
    cache = stack.new_cache(5, MAX_LENGTH).first_rows(4)
    cache.expand_from(prefixes)
    cache.pad = torch.tensor(pads)
    actual = torch.cat([stack.forward(part, cache) for part in x[:, 6:].split([4, 1], 1)], 1)
    for b, pad in enumerate(pads):
        alone = torch.cat([x[b : b + 1, :6], x[b : b + 1, 6 + pad :]], 1)
        close(actual[b : b + 1, pad:], reference(model, alone)[:, 6:])


@pytest.mark.parametrize("pads", [None, [0, 2, 5, 1]], ids=["even", "padded"])
def test_rows_that_keep_different_numbers(model: LlamaModel, pads: list[int] | None) -> None:
    """A pass has true rows, then rejected ones; what is kept goes on as if it stood alone."""
    x, stack = rows(24, batch=4), DecoderStack(model)
    expected = [reference(model, x[b : b + 1, (pads or [0] * 4)[b] :]) for b in range(4)]
    cache = stack.new_cache(4, MAX_LENGTH)
    cache.pad = None if pads is None else torch.tensor(pads)
    stack.forward(x[:, :8], cache)
    read, going = [8] * 4, [0, 1, 2, 3]
    for kept in ([4, 1, 2, 0], [1, 1, 4, 0], [1, 3, 1, 1], [3, 2, 0]):
        if len(kept) < len(going):
            going = cache.retire([0, 1, 3])
        new = rows(4, batch=len(kept), seed=sum(read))
        for row, (b, number) in enumerate(zip(going, kept, strict=True)):
            new[row, :number] = x[b, read[b] : read[b] + number]
        states = stack.forward(new, cache)
        cache.keep_each(4, kept)
        for row, (b, number) in enumerate(zip(going, kept, strict=True)):
            first = read[b] - (pads or [0] * 4)[b]
            close(states[row, :number], expected[b][0, first : first + number])
            read[b] += number
        assert cache.length == max(read[b] for b in going)


def test_positions_beyond_the_configured_ones(model: LlamaModel) -> None:
    x = rows(140)
    expected = reference(model, x)
    stack = DecoderStack(model)
    assert stack.max_positions == 128
    cache = stack.new_cache(1, 140)
    close(torch.cat([stack.forward(part, cache) for part in x.split([138, 2], 1)], 1), expected)


def test_a_result_outlives_the_next_step(model: LlamaModel) -> None:
    stack = DecoderStack(model)
    cache = stack.new_cache(1, MAX_LENGTH)
    first = stack.forward(rows(1), cache)
    kept = first.clone()
    stack.forward(rows(1, seed=5), cache)
    assert torch.equal(first, kept)


def test_quantised_or_biased_projections_stay_modules(model: LlamaModel) -> None:
    """What is not a plain linear cannot be fused; the modules are called one by one."""

    class Wrapped(torch.nn.Linear):
        pass

    x = rows(6)
    expected = reference(model, x)
    for layer in model.layers:
        for block, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (layer.mlp, ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                plain = getattr(block, name)
                wrapped = Wrapped(plain.in_features, plain.out_features, bias=False)
                wrapped.weight = plain.weight
                setattr(block, name, wrapped)
    stack = DecoderStack(model)
    cache = stack.new_cache(1, MAX_LENGTH)
    close(torch.cat([stack.forward(part, cache) for part in x.split([4, 2], 1)], 1), expected)

"""Captured passes against transformers' ``LlamaModel`` without a cache.

On a GPU they are what they are in use. Elsewhere the kernels' places are taken by plain torch and
a replay is the captured work run again, so that all that surrounds them is tested everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaModel

from tests.pairs import plain_kernels
from xsd.pairs.base import Media, Prompt
from xsd.pairs.cache import KVCache, TreeRows
from xsd.pairs.launch import Chip, HeadShape
from xsd.pairs.llama import LlamaDecoder
from xsd.pairs.modules import ModuleLayers
from xsd.pairs.step import DecoderStack

WIDTH, VOCAB, LENGTH = 48, 50, 100
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass
class Place:
    """Where a test runs."""

    device: torch.device
    dtype: torch.dtype
    captured: list[object]
    """An entry a capture."""

    def close(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


class Replayed:
    """Runs the work again, as a replay does: into the tensors of the first run."""

    def __init__(self, work: Callable[[], Any], lane: object) -> None:
        self._work = work
        self.result = work()

    def replay(self) -> Any:
        again = self._work()
        parts = (
            ((self.result, again),)
            if isinstance(again, Tensor)
            else zip(self.result, again, strict=True)
        )
        for old, new in parts:
            old.copy_(new)
        return self.result


@pytest.fixture(params=["plain", "plain, fused", pytest.param("cuda", marks=needs_gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    captured: list[object] = []
    if request.param != "cuda":
        # In double precision nothing is folded.
        device, dtype = torch.device("cpu"), torch.float64
        # Wherever Triton is, a module of its kernels must not be left with these in their place.
        for name in ("gpu_kernels", "four_bit_kernels"):
            monkeypatch.setitem(sys.modules, f"xsd.pairs.{name}", plain_kernels)
        monkeypatch.delitem(sys.modules, "xsd.pairs.graphs", raising=False)
        graphs = import_module("xsd.pairs.graphs")
        monkeypatch.setattr(graphs, "FUSED", (dtype,) if "fused" in request.param else ())
        monkeypatch.setattr(graphs, "Capture", Replayed)
        monkeypatch.setattr(graphs, "Lane", lambda device: None)
        monkeypatch.setattr(Chip, "of", lambda device: Chip(4, 1 << 16))
        monkeypatch.setattr(DecoderStack, "_lay_out", lambda self, m: graphs.GraphedLayers(m))
    else:
        device, dtype = torch.device("cuda"), torch.float32
        graphs = import_module("xsd.pairs.graphs")
    made = graphs.Capture

    def count(work: Callable[[], Any], lane: Any) -> Any:
        captured.append(work)
        return made(work, lane)

    monkeypatch.setattr(graphs, "Capture", count)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield Place(device, dtype, captured)
    torch.set_default_dtype(default)
    if request.param != "cuda":
        del sys.modules["xsd.pairs.graphs"]


@pytest.fixture(params=["multi-head", "grouped-query", "wide-heads"])
def model(request: pytest.FixtureRequest, place: Place) -> LlamaModel:
    heads, kv_heads, head_dim = {
        "multi-head": (4, 4, 12),
        "grouped-query": (6, 2, 16),
        "wide-heads": (2, 1, 40),
    }[request.param]
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval().to(place.device)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def reference(model: LlamaModel, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(inputs_embeds=x, use_cache=False).last_hidden_state


def rows(place: Place, num: int, batch: int = 1, seed: int = 1) -> Tensor:
    made = torch.randn(batch, num, WIDTH, generator=torch.Generator().manual_seed(seed))
    return made.to(place.device)


@pytest.mark.parametrize("split", [[70, 1, 1, 1, 1], [66, 4, 8], [5, 1, 3, 64], [1, 1, 17, 2]])
def test_cached_rows(model: LlamaModel, place: Place, split: list[int]) -> None:
    x = rows(place, sum(split))
    expected = reference(model, x)
    stack = DecoderStack(model)
    cache = stack.new_cache(1, LENGTH)
    place.close(torch.cat([stack.forward(part, cache) for part in x.split(split, 1)], 1), expected)
    assert cache.length == sum(split)
    # One a row count; the prefill is none.
    assert len(place.captured) == len({size for size in split if size <= 64})


def test_a_pass_is_captured_for_each_cache(model: LlamaModel, place: Place) -> None:
    x, other = rows(place, 9), rows(place, 9, seed=2)
    expected, of_other = reference(model, x), reference(model, other)
    stack = DecoderStack(model)
    caches = [stack.new_cache(1, LENGTH) for _ in range(2)]
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        place.close(stack.forward(x[:, start:stop], caches[0]), expected[:, start:stop])
        place.close(stack.forward(other[:, start:stop], caches[1]), of_other[:, start:stop])
    assert len(place.captured) == 4


def test_rollback_leaves_no_trace_and_results_outlive_the_next_pass(
    model: LlamaModel, place: Place
) -> None:
    x, rejected = rows(place, 12), rows(place, 6, seed=2)
    expected = reference(model, x)
    stack = DecoderStack(model)
    cache = stack.new_cache(1, LENGTH)
    stack.forward(x[:, :7], cache)
    stack.forward(torch.cat([x[:, 7:8], rejected], 1), cache)
    cache.length = 8
    first = stack.forward(x[:, 8:9], cache)
    second = stack.forward(x[:, 9:10], cache)
    place.close(torch.cat([first, second], 1), expected[:, 8:10])


def test_a_tree_is_its_branches_read_one_by_one(model: LlamaModel, place: Place) -> None:
    before, tree = rows(place, 5), rows(place, 4, seed=3)
    stack = DecoderStack(model)
    cache = stack.new_cache(1, LENGTH)
    stack.forward(before, cache)
    # 0 -> 1 -> 3, and 0 -> 2.
    ancestors = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]])
    depths = torch.tensor([0, 1, 1, 2])
    cache.tree = TreeRows(depths.to(place.device), ancestors.bool().to(place.device))
    states = stack.forward(tree, cache)[0]
    cache.tree = None
    for branch in ([0, 1, 3], [0, 2]):
        expected = reference(model, torch.cat([before, tree[:, branch]], 1))[0, 5:]
        place.close(states[branch], expected)
    # The next pass of as many rows is a chain again.
    cache.length = 5
    expected = reference(model, torch.cat([before, tree], 1))[0, 5:]
    place.close(stack.forward(tree, cache)[0], expected)


@pytest.mark.parametrize("branched", [False, True])
def test_padded_passes_say_the_same(model: LlamaModel, place: Place, branched: bool) -> None:
    x = rows(place, 13)
    expected = reference(model, x)
    stack = DecoderStack(model)
    cache = stack.new_cache(1, 14)
    assert stack.graphs is not None
    stack.graphs.row_sizes = (1, 4, 4, 4, 8, 8, 8, 8)
    stack.forward(x[:, :6], cache)
    if branched:
        lower = torch.ones(2, 2, dtype=torch.bool, device=place.device).tril()
        cache.tree = TreeRows(torch.arange(2, device=place.device), lower)
    place.close(stack.forward(x[:, 6:8], cache), expected[:, 6:8])
    cache.tree = None
    place.close(stack.forward(x[:, 8:11], cache), expected[:, 8:11])
    # Six rows and four: one shape each. Two that would not fit in fours run as two.
    assert len(place.captured) == 2
    place.close(stack.forward(x[:, 11:], cache), expected[:, 11:])
    assert cache.length == 13 and len(place.captured) == 3


def test_what_is_not_captured_runs_as_before(model: LlamaModel, place: Place) -> None:
    x = rows(place, 9, batch=2)
    expected = reference(model, x)
    stack = DecoderStack(model)
    cache = stack.new_cache(2, LENGTH)
    place.close(torch.cat([stack.forward(part, cache) for part in x.split([8, 1], 1)], 1), expected)
    seen: list[int] = []
    stack.tap = lambda number, _: seen.append(number)
    one = stack.new_cache(1, LENGTH)
    place.close(stack.forward(x[:1], one), expected[:1])
    assert seen == [1, 2, 3] and not place.captured


def test_a_full_cache_is_refused_and_a_longer_one_gets_angles(
    model: LlamaModel, place: Place
) -> None:
    x = rows(place, 140)
    expected = reference(model, x)
    stack = DecoderStack(model)
    short = stack.new_cache(1, 8)
    place.close(stack.forward(x[:, :8], short), expected[:, :8])
    with pytest.raises(AssertionError, match="8 positions, 9 needed"):
        stack.forward(x[:, :1], short)
    cache = stack.new_cache(1, 140)
    parts = [stack.forward(part, cache) for part in x.split([100, 38, 2], 1)]
    place.close(torch.cat(parts, 1), expected)
    # The tables that the first capture read are gone; its cache is captured again.
    short.length = 0
    place.close(stack.forward(x[:, :8], short), expected[:, :8])


class Speaking(LlamaDecoder):
    def prompt(self, question: str) -> Prompt:
        raise NotImplementedError

    def pixels(self, media: Media) -> Tensor:
        raise NotImplementedError

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def decoder(model: LlamaModel, place: Place) -> Speaking:
    head = torch.nn.Linear(WIDTH, VOCAB + 6, bias=False, device=place.device)
    return Speaking(model, head.requires_grad_(False), None, GenerationConfig(eos_token_id=2))


def eager(decoder: Speaking, ids: list[int]) -> tuple[Tensor, Tensor]:
    """States and logits of ids, by transformers' own forward."""
    x = decoder.embedding[torch.tensor([ids], device=decoder.stack.device)]
    states = reference(decoder.language, x)[0]  # type: ignore[attr-defined]
    return states, decoder.logits(states)


def test_reading_ids_is_embedding_passing_and_choosing(
    decoder: Speaking, model: LlamaModel, place: Place
) -> None:
    decoder.language = model  # type: ignore[attr-defined]
    decoder.limit_vocab(VOCAB)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    states, logits = eager(decoder, ids)
    cache = decoder.new_cache(1, LENGTH)
    found = [decoder.read(ids[:4], cache)]
    place.close(found[0].logits(), logits[:4])
    assert found[0].choose() == logits[:4].argmax(-1).tolist()
    found.append(decoder.read(torch.tensor(ids[4:], device=place.device), cache))
    assert found[1].choose() == logits[4:].argmax(-1).tolist()
    # States hold for good, beyond the next pass of their shape.
    place.close(torch.cat([scored.states for scored in found]), states)
    assert cache.length == 8 and len(place.captured) == 1


def test_a_head_that_is_cut_later_is_captured_again(decoder: Speaking, place: Place) -> None:
    cache: KVCache = decoder.new_cache(1, LENGTH)
    assert decoder.read([3], cache).logits().shape == (1, VOCAB + 6)
    decoder.limit_vocab(VOCAB)
    assert decoder.read([3], cache).logits().shape == (1, VOCAB)


def test_prepared_passes_are_not_captured_later(decoder: Speaking, place: Place) -> None:
    cache = decoder.new_cache(1, 6)
    decoder.prepare(cache, 64)
    assert len(place.captured) == 6 and cache.length == 0
    decoder.read([3, 4, 5], cache)
    decoder.set_row_sizes((1, 3))
    decoder.read([3, 4], cache)
    assert len(place.captured) == 6


@needs_gpu
@pytest.mark.parametrize("num_rows", [1, 5, 22, 64])
@pytest.mark.parametrize("heads", [(4, 4, 12), (6, 2, 16), (32, 32, 128), (8, 2, 64)])
@pytest.mark.parametrize("length", [0, 63, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(
    num_rows: int, heads: tuple[int, int, int], length: int, dtype: torch.dtype
) -> None:
    from xsd.pairs import gpu_kernels as kernels

    shape = HeadShape(*heads)
    device = torch.device("cuda")
    chip = Chip.of(device)
    draw = torch.Generator(device).manual_seed(num_rows + length)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=draw, dtype=torch.float32).to(dtype)

    all_heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = random(num_rows, all_heads * shape.head_dim)
    tables = random(1000, shape.head_dim), random(1000, shape.head_dim)
    caches = [random(shape.num_kv_heads, 1000, shape.head_dim) for _ in range(2)]
    position = torch.tensor([length], dtype=torch.int32, device=device)
    depths = torch.arange(64, dtype=torch.int32, device=device) // 2
    ancestors = torch.randint(0, 2, (64, 64), device=device, generator=draw).tril()
    ancestors = (ancestors | torch.eye(64, device=device, dtype=torch.long)).to(torch.uint8)
    # The reference computes in double precision on what was rounded for both.
    exact = [x.double() for x in (qkv, *tables, *caches)]
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    queries = kernels.rotate_and_append(qkv, tables, position, depths, *caches, shape)
    expected = plain_kernels.rotate_and_append(
        exact[0], (exact[1], exact[2]), position, depths, exact[3], exact[4], shape
    )
    torch.testing.assert_close(queries.double(), expected, **tolerance)
    for cache, wanted in zip(caches, exact[3:], strict=True):
        torch.testing.assert_close(cache.double(), wanted, **tolerance)
    attended = kernels.attend(queries, *caches, position, ancestors, shape, chip)
    wanted = plain_kernels.attend(
        queries.double(), *(x.double() for x in caches), position, ancestors, shape, chip
    )
    torch.testing.assert_close(attended.double(), wanted, **tolerance)
    if dtype != torch.float32:
        check_products(kernels, random, num_rows, chip, tolerance)
    gate_up = random(num_rows, 160)
    torch.testing.assert_close(
        kernels.silu_times(gate_up).double(),
        plain_kernels.silu_times(gate_up.double()),
        **tolerance,
    )


def check_products(
    kernels: Any,
    random: Callable[..., Tensor],
    num_rows: int,
    chip: Chip,
    tolerance: dict[str, float],
) -> None:
    for num_ins, num_outs in ((160, 48), (256, 384)):
        x, norm = random(num_rows, num_ins), random(num_ins)
        small, twice = (random(n, num_ins) / num_ins for n in (num_outs, 2 * num_outs))
        normed = {"norm": norm, "eps": 1e-5}
        for weight, how in (
            (small, normed),
            (twice, normed | {"gated": True}),
            (small, {"onto": random(num_rows, num_outs)}),
        ):
            exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in how.items()}
            wanted = plain_kernels.project(x.double(), weight.double(), chip, **exact)
            found = kernels.project(x, weight, chip, **how)
            torch.testing.assert_close(found.double(), wanted, **tolerance)


@needs_gpu
@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_half_precision_is_near_the_layers_as_they_are(num_rows: int) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=8, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    stack = DecoderStack(LlamaModel(config).to("cuda", torch.bfloat16).eval())
    graphs = stack.graphs
    assert graphs is not None
    x = torch.randn(1, 300 + num_rows, 256, device="cuda", dtype=torch.bfloat16)
    found = []
    for layers in (graphs, graphs.eager):
        stack._layers = layers
        cache = stack.new_cache(1, 400)
        stack.forward(x[:, :300], cache)
        found.append(stack.forward(x[:, 300:], cache).float())
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_without_a_gpu_nothing_is_captured() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=8,
    )  # fmt: skip
    stack = DecoderStack(LlamaModel(config).to(torch.bfloat16).eval())
    assert stack.graphs is None and type(stack._layers) is ModuleLayers

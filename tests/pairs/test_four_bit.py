"""NF4 weights as captured passes read them, against bitsandbytes' own."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from tests.pairs import plain_kernels
from xsd.pairs.four_bit import FourBitWeight
from xsd.pairs.launch import Chip
from xsd.pairs.look_up import NF4, nf4_look_up
from xsd.pairs.quantise import load_library, quantise, quantised
from xsd.pairs.step import DecoderStack

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rounded(sizes: list[tuple[int, int]], device: torch.device = CPU) -> list[Any]:
    torch.manual_seed(0)
    linears = [nn.Linear(num_ins, num_outs, bias=False) for num_outs, num_ins in sizes]
    library = load_library("4bit")
    return [quantised(library, linear, "4bit", device) for linear in linears]


def test_stacked_weights_are_the_librarys(device: torch.device = CPU) -> None:
    from bitsandbytes.functional import dequantize_4bit

    # On a CPU their first pass turns them into another format: others say what they say.
    modules, others = (rounded([(64, 256), (192, 256)], device) for _ in range(2))
    x = torch.randn(3, 256, dtype=torch.bfloat16, device=device)
    expected = [dequantize_4bit(m.weight.data, m.weight.quant_state).float() for m in modules]
    weight = FourBitWeight.of(modules)
    assert weight is not None and (weight.num_outs, weight.num_ins) == (256, 256)
    torch.testing.assert_close(weight.restore(), torch.cat(expected), rtol=2**-11, atol=1e-7)
    # The modules hold no copy, and go on as before.
    start = weight.packed.untyped_storage().data_ptr()
    assert all(m.weight.data.untyped_storage().data_ptr() == start for m in modules)
    assert all(torch.equal(m(x), other(x)) for m, other in zip(modules, others, strict=True))


def test_what_the_kernel_cannot_read_is_left_alone() -> None:
    assert FourBitWeight.of([nn.Linear(64, 256, bias=False)]) is None
    # Its blocks reach over the ends of rows.
    assert FourBitWeight.of(rounded([(64, 96)])) is None
    assert FourBitWeight.of(rounded([(64, 256), (64, 512)])) is None


def test_codes_are_looked_up_by_permutations() -> None:
    """The PTX, instruction by instruction."""
    bits = [value & 0xFFFF for value in torch.tensor(NF4).bfloat16().view(torch.int16).tolist()]
    draw = random.Random(0)
    for _ in range(300):
        codes = [draw.randrange(256) for _ in range(4)]
        registers = interpret(nf4_look_up(), sum(b << (8 * i) for i, b in enumerate(codes)))
        for shift, names in ((4, ("$0", "$1")), (0, ("$2", "$3"))):
            words = [registers[name] for name in names]
            found = [word >> half & 0xFFFF for word in words for half in (0, 16)]
            assert found == [bits[code >> shift & 15] for code in codes]


def interpret(ptx: str, given: int) -> dict[str, int]:
    registers = {"$4": given}

    def value(text: str) -> int:
        return registers[text] if text in registers else int(text, 0)

    def permute(a: int, b: int, chosen: int) -> int:
        source = b << 32 | a
        places = [chosen >> 4 * i & 15 for i in range(4)]
        assert max(places) < 8, "a set fourth bit would spread a sign"
        return sum((source >> 8 * place & 255) << 8 * i for i, place in enumerate(places))

    operations: dict[str, Callable[..., int]] = {
        "shr": lambda a, b: a >> b,
        "and": lambda a, b: a & b,
        "prmt": permute,
        "lop3": lambda a, b, mask, _: a & ~mask & 0xFFFFFFFF | b & mask,
    }
    for operation, target, rest in re.findall(r"(\w+)\.b32 (\S+), (.*);", ptx):
        registers[target] = operations[operation](*map(value, rest.split(", ")))
    return registers


@needs_gpu
@pytest.mark.parametrize("num_rows", [1, 5, 22, 64])
@pytest.mark.parametrize("size", [(256, 64), (320, 256), (4096, 4096), (192, 1152)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(num_rows: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    from xsd.pairs.four_bit_kernels import project_four_bit

    device = torch.device("cuda")
    chip, (num_outs, num_ins) = Chip.of(device), size
    weight = FourBitWeight.of(rounded([size, size], device))
    assert weight is not None
    random = partial(torch.randn, device=device, dtype=dtype)
    x, norm = random(num_rows, num_ins), random(num_ins)
    onto = random(num_rows, 2 * num_outs)
    for how in ({}, {"norm": norm, "eps": 1e-5}, {"norm": norm, "gated": True}, {"onto": onto}):
        exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in how.items()}
        wanted = plain_kernels.project(x.double(), weight.restore().double(), chip, **exact)
        found = project_four_bit(x, weight, chip, **how)
        assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


@needs_gpu
@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_captured_passes_are_near_the_librarys(num_rows: int) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=8, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model, device = LlamaModel(config).to(torch.bfloat16).eval(), torch.device("cuda")
    quantise(model, "4bit", device)
    stack = DecoderStack(model.to(device))
    graphs: Any = stack.graphs
    assert all(graphs._weights)
    x = torch.randn(1, 300 + num_rows, 256, device=device, dtype=torch.bfloat16)
    found: list[Tensor] = []
    layers: Callable[[], Any]
    for layers in (graphs, graphs.eager):
        stack._layers = layers
        cache = stack.new_cache(1, 400)
        stack.forward(x[:, :300], cache)
        found.append(stack.forward(x[:, 300:], cache).float())
    assert (found[0] - found[1]).norm() < 0.03 * found[1].norm()

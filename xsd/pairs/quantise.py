"""Weights of the decoder layers in 4 or 8 bits, through bitsandbytes; everything else stays."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from xsd.errors import XsdError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "8bit": torch.float16,
        "4bit": torch.bfloat16,
    }
)
"""Of activations, and of weights that are not quantised; the 8-bit kernels know float16 only."""
QUANTISED = ("8bit", "4bit")
_OUTLIER = 6.0
"""Activations of 8-bit layers that are larger stay in float16: bitsandbytes' own choice."""
_CPU_INPUTS, _CPU_OUTPUTS = 64, 32
"""A scale's block, and a tile of bitsandbytes' 4-bit kernels for CPUs."""
_BYTES_A_WEIGHT = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""4bit: a byte-sized scale a block of 64, and a float a 256 of those scales."""


def quantise(language_model: Any, quant: str, device: torch.device) -> None:
    """Round the plain linears of a ``LlamaModel``'s layers, in place, and move them to ``device``.

    One weight after another is read, rounded and dropped: beyond the rounded model, the peak is
    one weight. What else the model has stays where it is.

    Args:
        quant: ``4bit`` (NF4, its scales quantised again) or ``8bit`` (a scale a row).

    Raises:
        XsdError: bitsandbytes cannot be imported here.
    """
    library = load_library(quant)
    for path in plain_linears(language_model.layers):
        linear = language_model.layers.get_submodule(path)
        language_model.layers.set_submodule(path, quantised(library, linear, quant, device))


def refuse_widths(model: Any, quant: str, device: torch.device) -> None:
    """Refuse what bitsandbytes would fail at in the first forward pass.

    Args:
        model: of transformers, perhaps on the meta device.

    Raises:
        XsdError: a layer does not come in the blocks that the 4-bit CPU kernels take.
    """
    if quant != "4bit" or device.type != "cpu":
        return
    layers = model.get_decoder().layers
    for path in plain_linears(layers):
        linear = layers.get_submodule(path)
        if linear.in_features % _CPU_INPUTS or linear.out_features % _CPU_OUTPUTS:
            raise XsdError(
                f"{type(model).__name__}: layer {path} has {linear.in_features} inputs and "
                f"{linear.out_features} outputs; on a CPU --quant 4bit takes multiples of "
                f"{_CPU_INPUTS} and {_CPU_OUTPUTS} only: say --quant 8bit or bf16, or use a GPU"
            )


def plain_linears(layers: nn.Module) -> list[str]:
    """Paths of what is rounded; modules themselves would be kept alive by a list of them."""
    return [path for path, module in layers.named_modules() if type(module) is nn.Linear]


def quantised(library: Any, linear: nn.Linear, quant: str, device: torch.device) -> Any:
    """The rounded twin of a linear, on ``device``; rounds what the linear's weight now holds."""
    with torch.device("meta"):
        made = _empty_twin(library, linear, quant)
    weight = linear.weight.detach()
    if quant == "4bit":
        parameter = library.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    else:
        # Its class rounds on the way from host memory to a device, and nowhere else; in place.
        weight = weight.to("cpu", DTYPES[quant], copy=True)
        parameter = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.weight = parameter.to(device)
    made.bias = linear.bias
    return made.eval()


def _empty_twin(library: Any, linear: nn.Linear, quant: str) -> Any:
    size = (linear.in_features, linear.out_features, linear.bias is not None)
    if quant == "4bit":
        return library.Linear4bit(
            *size, compute_dtype=DTYPES[quant], compress_statistics=True, quant_type="nf4"
        )
    return library.Linear8bitLt(*size, has_fp16_weights=False, threshold=_OUTLIER)


def load_library(quant: str) -> Any:
    """bitsandbytes' modules.

    Raises:
        XsdError: it cannot be imported here.
    """
    # Its import complains of optional kernels that nothing here asks for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise XsdError(
            f"--quant {quant} needs bitsandbytes, which cannot be imported ({line}); "
            "pip install bitsandbytes, or say --quant bf16"
        ) from error
    return bitsandbytes.nn


def num_bytes(model: nn.Module, language_model: Any, quant: str) -> int:
    """What the model's parameters take in a precision; the model may lie on the meta device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    in_linears = 0
    if quant in QUANTISED:
        in_linears = sum(
            module.weight.numel()
            for module in language_model.layers.modules()
            if type(module) is nn.Linear
        )
    plain = (total - in_linears) * DTYPES[quant].itemsize
    return round(plain + in_linears * _BYTES_A_WEIGHT.get(quant, 0))

"""Weights of the decoder layers in 4 or 8 bits, through bitsandbytes; everything else stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xsd.errors import XsdError

COMPUTE_DTYPE: Mapping[str, torch.dtype] = {"4bit": torch.bfloat16, "8bit": torch.float16}
"""Of activations, and of what is not quantised; the 8-bit kernels know float16 only."""


def quantise(language_model: Any, bits: str) -> None:
    """Replace the plain linears of a ``LlamaModel``'s layers, in place.

    The weights are rounded when the model is moved to its device: call this before.

    Args:
        bits: a key of ``COMPUTE_DTYPE``.

    Raises:
        XsdError: bitsandbytes cannot be imported here.
    """
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        line = " ".join(str(error).split())
        raise XsdError(f"--quant {bits} needs bitsandbytes ({line}); say bf16 instead") from error
    for module in list(language_model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, _replacement(bitsandbytes.nn, child, bits))


def _replacement(library: Any, linear: nn.Linear, bits: str) -> Any:
    size = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.detach()
    if bits == "4bit":
        made = library.Linear4bit(*size, compute_dtype=COMPUTE_DTYPE[bits], quant_type="nf4")
        made.weight = library.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        made = library.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
        made.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.eval()

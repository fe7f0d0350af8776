"""The fast twin of a module for live decoding.

A step of one row on a CPU is a score of operations of a few microseconds, and ``nn.Module`` spends
as long again on looking up attributes and hooks. A head's step time decides its speedup, so live
decoding runs the same methods on a twin that has neither.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


def bind(module: nn.Module) -> Any:
    """A twin with ``module``'s methods, in eval mode, whose parameters are detached views.

    It follows in-place updates of the weights, records no gradients, and runs no hooks.
    """
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        call = partial(linear, weight=module.weight.detach(), bias=bias)
        call.weight, call.bias = module.weight.detach(), bias  # type: ignore[attr-defined]
        return call
    if isinstance(module, nn.LayerNorm):
        return partial(
            torch.layer_norm,
            normalized_shape=module.normalized_shape,
            weight=module.weight.detach(),
            bias=module.bias.detach(),
            eps=module.eps,
        )
    if isinstance(module, nn.ModuleList):
        return [bind(child) for child in module]
    if len([*module.children(), *module.parameters()]) == 0:
        return module.forward
    twin = copy.copy(module)
    twin.training = False
    # Instance attributes are found before nn.Module.__getattr__ is asked.
    twin.__dict__.update({name: bind(child) for name, child in module.named_children()})
    twin.__dict__.update({name: x.detach() for name, x in module.named_parameters(recurse=False)})
    return twin

"""What training spends its time on, on a CPU in float32, done faster.

- Products go to oneDNN: PyTorch hands them to MKL, which on processors of other makers leaves half
  of the vector unit idle. Same precision, half the time.
- Dropout draws four decisions of 16 bits from one number, where PyTorch draws one of 53.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_STEPS = 1 << 16
"""Probabilities that dropout can tell apart."""


def _onednn() -> Callable[..., Tensor] | None:
    """The operator behind compiled layers, where this build of PyTorch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if found is None else found.default


_product = _onednn()


def product(
    rows: Float[Tensor, "*rows D"], weight: Float[Tensor, "E D"], bias: Tensor | None = None
) -> Float[Tensor, "*rows E"]:
    """``rows @ weight.T + bias``; no gradient is recorded."""
    if _product is None or rows.device.type != "cpu" or rows.dtype != torch.float32:
        return functional.linear(rows, weight, bias)
    if not weight.is_contiguous() and not weight.mT.is_contiguous():
        # Of a slice's rows oneDNN makes a copy an element at a time.
        weight = weight.contiguous()
    return _product(rows, weight, bias, "none", [], "")


class CpuOps(TorchFunctionMode):
    """While it is entered, linear layers, dropout and attention with dropout are those below."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # What is being compiled stays as it was written: the compiler has no kernel of ours.
        found = None if torch.compiler.is_compiling() else _OURS.get(func)
        if found is not None and args[0].device.type == "cpu":
            made = found(*args, **(kwargs or {}))
            if made is not None:
                return made
        return func(*args, **(kwargs or {}))


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if rows.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    made: Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return made


def _dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    if not training or p == 0.0 or inplace:
        return None
    made: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return made


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    rate: float = 0.0,
    is_causal: bool = False,
) -> Tensor | None:
    """PyTorch has no fast attention with dropout here, and its slow one draws by PyTorch."""
    if rate == 0.0:
        return None
    scores = (query * query.shape[-1] ** -0.5) @ keys.mT
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    kept: Tensor = _Dropout.apply(scores.softmax(dim=-1), rate)  # type: ignore[no-untyped-call]
    return kept @ values


_OURS: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.dropout: _dropout,
    functional.scaled_dot_product_attention: _attention,
}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad = outer[0].flatten(0, -2)
        to_rows, to_weight, to_bias = ctx.needs_input_grad
        return (
            product(outer[0], weight.mT) if to_rows else None,
            product(grad.mT, rows.flatten(0, -2).mT) if to_weight else None,
            grad.sum(dim=0) if to_bias else None,
        )


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept = round(_STEPS * (1.0 - p))
        mask = _drawn(x.shape, kept)
        ctx.save_for_backward(mask)
        # By the share that is really kept, so that the mean stays.
        ctx.scale = _STEPS / kept if kept else 0.0
        out: Tensor = (x * ctx.scale).mul_(mask)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (outer[0] * ctx.scale).mul_(mask), None


def _drawn(shape: torch.Size, kept: int) -> Bool[Tensor, ...]:
    count = shape.numel()
    numbers = torch.empty(-(-count // 4), dtype=torch.int64)
    numbers.random_(torch.iinfo(torch.int64).min, None)
    bits = numbers.view(torch.int16)[:count]
    return (bits < kept + torch.iinfo(torch.int16).min).view(shape)

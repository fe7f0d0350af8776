"""What happens to one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from xsd.kernels import LANES
from xsd.kernels.options import inner, reorder

ZERO, ONE = np.float32(0.0), np.float32(1.0)
_HALF = np.float32(0.5)
_LOG2_E = np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)  # adding 1.5 * 2**23 leaves no room for a fraction
_LIMIT = np.float32(87.0)
# 2**f for |f| <= 1/2, to single precision.
_C1, _C2, _C3 = np.float32(0.6931471806), np.float32(0.2402265070), np.float32(0.0555041087)
_C4, _C5, _C6 = np.float32(0.0096181291), np.float32(0.0013333558), np.float32(0.0001540353)

# Fitted for z from 0 to _FAR, where no more than 5e-9 lies beyond.
_FAR = np.float32(5.75)
_T0, _T1, _T2 = np.float32(0.797886729), np.float32(0.318285972), np.float32(0.0364252217)
_T3, _T4, _T5 = np.float32(-0.00494182156), np.float32(0.000117039548), np.float32(0.000129793116)
_T6, _T7, _T8 = np.float32(-3.17679114e-5), np.float32(3.42868202e-6), np.float32(-1.4869353e-7)


@intrinsic
def _larger(_: Any, a: Any, b: Any) -> Any:
    """The larger of two numbers: unlike ``max``, LLVM makes vectors of it in a reduction."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = ir.FloatType()
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(real, [real, real]), "llvm.maxnum.f32"
        )
        return builder.call(function, args, fastmath=("reassoc", "nnan", "nsz"))

    return types.float32(a, b), generate


@intrinsic
def _raise(_: Any, x: Any, shifted: Any) -> Any:
    """``x * 2**n``, where ``shifted`` is ``n + 1.5 * 2**23``: n lies in its lowest bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.IntType(32)
        x, shifted = (builder.bitcast(value, whole) for value in args)
        raised = builder.add(x, builder.shl(shifted, ir.Constant(whole, 23)))
        return builder.bitcast(raised, ir.FloatType())

    return types.float32(x, shifted), generate


@inner
def copy(x, out):
    for j in range(x.shape[0]):
        out[j] = x[j]


@inner
def add(x, out):
    for j in range(x.shape[0]):
        out[j] += x[j]


@reorder
def maximum(x):
    best = x[0]
    for j in range(1, x.shape[0]):
        best = _larger(best, x[j])
    return best


@reorder
def _sum(x):
    total = ZERO
    for j in range(x.shape[0]):
        total += x[j]
    return total


@reorder
def _sum_squares(x, mean):
    total = ZERO
    for j in range(x.shape[0]):
        total += (x[j] - mean) * (x[j] - mean)
    return total


@inner
def normalise(x, mean, eps, out):
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps)``: with a mean of zero, RMSNorm without its
    factors."""
    scale = ONE / np.sqrt(_sum_squares(x, mean) / np.float32(x.shape[0]) + eps)
    for j in range(x.shape[0]):
        out[j] = (x[j] - mean) * scale


@inner
def centre(x, eps, out):
    """LayerNorm without its factors."""
    normalise(x, _sum(x) / np.float32(x.shape[0]), eps, out)


@inner
def _exp(x):
    t = min(max(x, -_LIMIT), _LIMIT) * _LOG2_E
    shifted = t + _ROUND
    f = t - (shifted - _ROUND)
    return _raise(
        ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6))))), shifted
    )


@reorder
def _exp_all(x, shift):
    """``x = exp(x - shift)`` in place; the sum."""
    total = ZERO
    for j in range(x.shape[0]):
        x[j] = _exp(x[j] - shift)
        total += x[j]
    return total


@inner
def softmax(x, size):
    """Over the first ``size`` of x, in place, but for the factor that is returned.

    x has room for whole vectors, which become zero.
    """
    padded = (size + LANES - 1) // LANES * LANES
    for j in range(size, padded):
        x[j] = -np.inf
    line = x[:padded]
    # What exp makes of the end is too little to count beside the largest, which is one.
    total = _exp_all(line, maximum(line))
    for j in range(size, padded):
        x[j] = ZERO
    return ONE / total


@inner
def swish(x, slope):
    """``x = x * sigmoid(slope * x)`` in place: SiLU with a slope of one, CLIP's GELU with 1.702."""
    for j in range(x.shape[0]):
        x[j] = x[j] / (ONE + _exp(-slope * x[j]))


@inner
def gated(gate, up):
    """``gate = silu(gate) * up`` in place."""
    for j in range(gate.shape[0]):
        gate[j] = gate[j] / (ONE + _exp(-gate[j])) * up[j]


@inner
def gelu(x):
    """``x = x * Phi(x)`` in place, to 5e-8: what a polynomial makes of log(2 Phi(-z)) / -z."""
    for j in range(x.shape[0]):
        z = min(abs(x[j]), _FAR)
        power = _T4 + z * (_T5 + z * (_T6 + z * (_T7 + z * _T8)))
        power = _T0 + z * (_T1 + z * (_T2 + z * (_T3 + z * power)))
        tail = _HALF * _exp(-z * power)
        x[j] *= tail if x[j] < ZERO else ONE - tail


@inner
def turn(x, num_heads, half, cos, sin):
    """Rotate the two halves of every head into each other."""
    for h in range(num_heads):
        start = 2 * half * h
        a, b = x[start : start + half], x[start + half : start + 2 * half]
        for i in range(half):
            u, v = a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]
            a[i], b[i] = u, v

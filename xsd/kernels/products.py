"""Matrix products of a few rows, whose every row is summed in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from xsd.kernels import LANES, PANEL
from xsd.kernels.options import inner


def pack(weight: Float[np.ndarray, "*layers K N"]) -> Float[np.ndarray, "*layers panels K 64"]:
    """A weight in panels of 64 columns, the last one filled up with zeros."""
    *layers, size, width = weight.shape
    num_panels = -(-width // PANEL)
    padded = np.zeros((*layers, size, num_panels * PANEL), np.float32)
    padded[..., :width] = weight
    panels = padded.reshape(*layers, size, num_panels, PANEL)
    return np.ascontiguousarray(np.moveaxis(panels, -2, -3))


def halve(panels: Float[np.ndarray, "*panels K 64"]) -> np.ndarray:
    """Packed weights, rounded to bfloat16, two rows to one, the first of them in the low half:
    ``[*panels, ceil(K / 2), 64]`` uint32, half as many bytes to read.

    Behind an odd K is a row of zeros, and what is multiplied with it must be finite there.
    """
    if panels.shape[-2] % 2:
        panels = np.concatenate([panels, np.zeros_like(panels[..., :1, :])], axis=-2)
    bits = panels.view(np.uint32)
    # To the nearest, and to the even one of two.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.ascontiguousarray(rounded[..., ::2, :] | rounded[..., 1::2, :] << np.uint32(16))


def _vectors_at_once(num_rows: int) -> int:
    """Vectors of 16 a row whose sums the machine's registers hold."""
    if get_host_cpu_features().get("avx512f"):
        return 4
    return {1: 4, 2: 2}.get(num_rows, 1)


def _block(num_rows: int, num_vectors: int) -> Any:
    """A product's innermost part, whose sums stay in registers.

    ``out[row + r, column + j] += sum_k x[row + r, start + k] * w[first + k, w_column + j]`` for r
    below ``num_rows`` and j below 16 ``num_vectors``; k goes from 0 to ``size`` (at least 1), one
    after the other. Of a ``w`` that was halved each row is two, and ``size`` counts its own. Loops
    in Python's syntax leave the choice of registers to LLVM, which then stores and loads every sum
    at every k: half as fast at one row, a quarter at five.
    """

    @intrinsic
    def block(_: Any, x: Any, row: Any, start: Any, w: Any, first: Any, w_column: Any, size: Any,
              out: Any, column: Any) -> Any:  # fmt: skip
        # Anything else would be read as if it were.
        if any(array.layout != "C" for array in (x, w, out)):
            raise TypingError("kernels take C-contiguous arrays")

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            real, index, word = ir.FloatType(), ir.IntType(64), ir.IntType(32)
            vector, words = ir.VectorType(real, LANES), ir.VectorType(word, LANES)
            is_halved = signature.args[3].dtype == types.uint32
            arrays = {
                name: context.make_array(signature.args[i])(context, builder, args[i])
                for i, name in ((0, "x"), (3, "w"), (7, "out"))
            }
            row, start, first, w_column, size, column = (args[i] for i in (1, 2, 4, 5, 6, 8))

            def constant(value: int) -> Any:
                return ir.Constant(index, value)

            def at(base: Any, *offsets: Any) -> Any:
                for offset in offsets:
                    base = builder.gep(base, [offset], source_etype=real)
                return base

            def width(name: str) -> Any:
                return builder.extract_value(arrays[name].shape, 1)

            def place(name: str, *, row: Any, column: Any) -> Any:
                return at(arrays[name].data, builder.mul(row, width(name)), column)

            def load(pointer: Any, kind: Any = vector) -> Any:
                loaded = builder.load(builder.bitcast(pointer, kind.as_pointer()), typ=kind)
                loaded.align = 4
                return loaded

            def load_rows(pointers: list[Any]) -> list[list[Any]]:
                """One row of weights, or the two that lie in one."""
                if not is_halved:
                    return [[load(pointer) for pointer in pointers]]
                both = [load(pointer, words) for pointer in pointers]
                low = [builder.shl(pair, ir.Constant(words, [16] * LANES)) for pair in both]
                high = [
                    builder.and_(pair, ir.Constant(words, [0xFFFF0000] * LANES)) for pair in both
                ]
                return [[builder.bitcast(x, vector) for x in row] for row in (low, high)]

            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
            )
            undefined = ir.Constant(vector, ir.Undefined)
            zeros = ir.Constant(words, [0] * LANES)
            rows = [builder.add(row, constant(r)) for r in range(num_rows)]
            sources = [place("x", row=r, column=start) for r in rows]
            at_once = min(num_vectors, _vectors_at_once(num_rows))
            for group in range(0, num_vectors, at_once):
                lanes = [constant(LANES * (group + i)) for i in range(at_once)]
                outs = [[at(place("out", row=r, column=column), i) for i in lanes] for r in rows]
                begun = [[load(pointer) for pointer in pointers] for pointers in outs]
                before = builder.block
                body, after = (builder.append_basic_block(name) for name in ("body", "after"))
                builder.branch(body)
                builder.position_at_end(body)
                k = builder.phi(index)
                sums = [[builder.phi(vector) for _ in lanes] for _ in rows]
                weights = place("w", row=builder.add(first, k), column=w_column)
                added, at_k = sums, builder.add(k, k) if is_halved else k
                for factors in load_rows([at(weights, i) for i in lanes]):
                    lines, added = added, []
                    for source, line in zip(sources, lines, strict=True):
                        one = builder.load(at(source, at_k), typ=real)
                        one = builder.insert_element(undefined, one, ir.Constant(word, 0))
                        one = builder.shuffle_vector(one, undefined, zeros)
                        pairs = zip(factors, line, strict=True)
                        added.append([builder.call(fma, [one, w, total]) for w, total in pairs])
                    at_k = builder.add(at_k, constant(1))
                following = builder.add(k, constant(1))
                k.add_incoming(constant(0), before)
                k.add_incoming(following, body)
                for line, old, new in zip(sums, begun, added, strict=True):
                    for total, old_part, new_part in zip(line, old, new, strict=True):
                        total.add_incoming(old_part, before)
                        total.add_incoming(new_part, body)
                builder.cbranch(builder.icmp_signed("<", following, size), body, after)
                builder.position_at_end(after)
                for pointers, parts in zip(outs, added, strict=True):
                    for pointer, part in zip(pointers, parts, strict=True):
                        target = builder.bitcast(pointer, vector.as_pointer())
                        builder.store(part, target).align = 4
            return context.get_dummy_value()

        return types.void(x, row, start, w, first, w_column, size, out, column), generate

    return block


_BLOCK_1, _BLOCK_2, _BLOCK_3, _BLOCK_4, _BLOCK_5, _BLOCK_6 = (_block(r, 4) for r in range(1, 7))
_NARROW_1, _NARROW_2, _NARROW_3, _NARROW_4, _NARROW_5, _NARROW_6 = (
    _block(r, 2) for r in range(1, 7)
)
NARROW = 2 * LANES
"""Columns of a narrow block."""


@inner
def add_panel(x, row, stop, start, w, first, w_column, size, out, column):
    """A block of 64 columns for the rows up to ``stop``, a few at a time."""
    while row < stop:
        left = stop - row
        if left == 1:
            _BLOCK_1(x, row, start, w, first, w_column, size, out, column)
            row += 1
        elif left == 2:
            _BLOCK_2(x, row, start, w, first, w_column, size, out, column)
            row += 2
        elif left == 3:
            _BLOCK_3(x, row, start, w, first, w_column, size, out, column)
            row += 3
        elif left == 4 or left == 7 or left == 8:
            _BLOCK_4(x, row, start, w, first, w_column, size, out, column)
            row += 4
        elif left == 5 or left == 9 or left == 10:
            _BLOCK_5(x, row, start, w, first, w_column, size, out, column)
            row += 5
        else:
            _BLOCK_6(x, row, start, w, first, w_column, size, out, column)
            row += 6


@inner
def add_narrow(x, row, stop, start, w, first, w_column, size, out, column):
    """A block of 32 columns for the rows up to ``stop``."""
    while row < stop:
        left = stop - row
        if left == 1:
            _NARROW_1(x, row, start, w, first, w_column, size, out, column)
            row += 1
        elif left == 2:
            _NARROW_2(x, row, start, w, first, w_column, size, out, column)
            row += 2
        elif left == 3:
            _NARROW_3(x, row, start, w, first, w_column, size, out, column)
            row += 3
        elif left == 4 or left == 7 or left == 8:
            _NARROW_4(x, row, start, w, first, w_column, size, out, column)
            row += 4
        elif left == 5 or left == 9 or left == 10:
            _NARROW_5(x, row, start, w, first, w_column, size, out, column)
            row += 5
        else:
            _NARROW_6(x, row, start, w, first, w_column, size, out, column)
            row += 6


@inner
def add_product(x, panels, out):
    """``out += x @ w``, where ``panels = pack(w)``.

    Args:
        x: [R, >= K].
        panels: [P, K, 64].
        out: [R, 64 P].
    """
    for p in range(panels.shape[0]):
        add_panel(x, 0, x.shape[0], 0, panels[p], 0, 0, panels.shape[1], out, p * PANEL)

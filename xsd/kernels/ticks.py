"""The processor's own count of time, where a call into the system would cost too much."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def ticks(_: Any) -> Any:
    """Steadily counted up, at a rate that is the machine's: only shares of it mean anything."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.module.declare_intrinsic(
            "llvm.readcyclecounter", (), ir.FunctionType(ir.IntType(64), ())
        )
        return builder.call(counter, ())

    return types.int64(), generate

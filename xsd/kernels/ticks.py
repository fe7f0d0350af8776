"""The processor's own counter: what shares of a compiled call its parts take."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def ticks(_: Any) -> Any:
    """Ticks since some moment, int64; reading them takes some 10 ns. Their rate is no one's
    business: only shares are formed. A machine that does not let programs read it says 0 always.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])
        counter = builder.module.declare_intrinsic("llvm.readcyclecounter", fnty=kind)
        return builder.call(counter, [])

    return types.int64(), generate

"""Cores that wait for each other inside kernels: a number in memory, looked at until it is there.

A thread that sleeps takes tens of microseconds to wake up, as long as a layer of a small model.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from xsd.kernels import ABANDONED
from xsd.kernels.options import inner

_PATIENCE = 4096
"""Looks before a core is offered to others: some microseconds."""


def _item(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index], source_etype=ir.IntType(64))


@intrinsic
def _look(_: Any, numbers: Any, index: Any) -> Any:
    """``numbers[index]``, and whatever was written before it was published."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _item(context, builder, signature.args[0], *args)
        return builder.load_atomic(place, "acquire", 8, typ=ir.IntType(64))

    return types.int64(numbers, index), generate


@intrinsic
def publish(_: Any, numbers: Any, index: Any, value: Any) -> Any:
    """``numbers[index] = value``, once all that was written before can be seen."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, number = args
        place = _item(context, builder, signature.args[0], array, at)
        builder.store_atomic(number, place, "release", 8)
        return context.get_dummy_value()

    return types.void(numbers, index, types.int64), generate


@intrinsic
def _give_way(_: Any) -> Any:
    """Let another thread have this core, if one wants it (POSIX)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield"
        )
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@inner
def wait_for(numbers, index, least):
    """Until ``numbers[index]`` (int64) is ``least`` or more; whether that was not abandoned."""
    looks = 0
    while True:
        found = _look(numbers, index)
        if found >= least:
            return True
        if found == ABANDONED:
            return False
        looks += 1
        if looks > _PATIENCE:
            _give_way()

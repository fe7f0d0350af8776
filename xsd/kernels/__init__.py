"""Compiled arithmetic for passes of a few rows on a CPU.

At a row or two a small model's step is mostly the library around it: a call of a few microseconds
for every operation, and matrix products made for hundreds of rows. Here a whole pass is one call.

A row's numbers do not depend on how many rows go through together: every sum runs in an order that
the row alone decides. So plain and speculative decoding agree to the last bit, and a branch of a
draft tree is a chain.

What Python calls is ``exact`` and allocates; what it is made of is ``inner`` and does not.
Numba compiles a kernel when it is first called and keeps the result on disk. All arrays are
C-contiguous float32 unless said.
"""

from importlib import import_module
from typing import Any

LANES = 16
"""Floats a vector; where a machine has shorter ones, LLVM splits them."""
PANEL = 64
"""Columns of a weight that lie together in memory."""
ABANDONED = -1
"""What cores find instead of a number they wait for, where it will never come."""

_MODULES = {
    "bicubic": "images",
    "choose": "argmax",
    "coupled_chain": "drafter",
    "decoder_pass": "decoder",
    "draft": "drafting",
    "encode_images": "encoder",
    "enter_rows": "drafter",
    "halve": "products",
    "head_pass": "head",
    "normalise_image": "images",
    "pack": "products",
    "pool": "drafter",
    "project": "encoder",
    "read_pass": "decoder",
    "remember": "drafter",
    "share_of_pass": "decoder",
    "speak": "answer",
    "verify": "answer",
}


def __getattr__(name: str) -> Any:
    """Kernels by name. Numba is imported with the first of them, and not where none is used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

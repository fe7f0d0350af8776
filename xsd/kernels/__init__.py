"""Compiled arithmetic for passes of a few rows on a CPU.

At a row or two a small model's step is mostly the library around it: a call of a few microseconds
for every operation, and matrix products made for hundreds of rows. Here a whole pass is one call.

A row's numbers do not depend on how many rows go through together: every sum runs in an order that
the row alone decides. So plain and speculative decoding agree to the last bit, and a branch of a
draft tree is a chain.

Numba compiles a kernel when it is first called and keeps the result on disk. All arrays are
C-contiguous float32 unless said.
"""

from xsd.kernels.choose import choose
from xsd.kernels.decoder import decoder_pass
from xsd.kernels.head import head_pass
from xsd.kernels.products import PANEL, pack

__all__ = ["PANEL", "choose", "decoder_pass", "head_pass", "pack"]

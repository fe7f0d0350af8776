"""How kernels are compiled. Fused multiply-adds everywhere."""

from __future__ import annotations

from typing import Any

from numba import njit

_COMMON: dict[str, Any] = {"cache": True, "error_model": "numpy", "nogil": True}

exact = njit(fastmath={"contract"}, **_COMMON)
"""Every sum in the order in which it is written."""
reorder = njit(fastmath={"contract", "reassoc", "nnan", "nsz"}, **_COMMON)
"""Sums and maxima of one row, in an order of the compiler's, the same for every row."""

"""How an adapter's rows begin with the drafter's states, as the kernels take it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from xsd import kernels
from xsd.pairs.folded import affine, stack


class DrafterEntry(NamedTuple):
    """The ``entry`` of ``kernels.enter_rows``: what an adapter does not do has no panels."""

    bridge: Float[np.ndarray, "panels Dd 64"]
    fuse: Float[np.ndarray, "panels both 64"]
    fuse_bias: Float[np.ndarray, " columns"]
    factor: Float[np.ndarray, " Dv"]
    remember: Float[np.ndarray, "layers panels Dv 64"]
    remember_bias: Float[np.ndarray, "layers columns"]
    is_raw: bool

    @classmethod
    def of(cls, enter: nn.Module, *, is_raw: bool = False) -> DrafterEntry:
        """States through ``enter``, a linear map without bias or the identity.

        Args:
            is_raw: rows begin with them as they are; false: something else is made of them.
        """
        bridge = _packed(0, 0)
        if isinstance(enter, nn.Linear):
            bridge = kernels.pack(enter.weight.detach().t().numpy())
        nothing = np.zeros(0, np.float32)
        return cls(bridge, _packed(0, 0), nothing, nothing, _packed(0, 0, 0), nothing[None], is_raw)

    def fused(self, gate: nn.Linear, mix: nn.Linear, factor: Float[Tensor, " Dv"]) -> DrafterEntry:
        """Rows begin with a gated fusion of drafter and verifier states, normalised."""
        parts = [affine(linear) for linear in (gate, mix)]
        weight, bias = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
        fuse, fuse_bias = stack([(weight, bias)])
        return self._replace(fuse=fuse[0], fuse_bias=fuse_bias[0], factor=factor.detach().numpy())

    def remembered(self, key_values: list[tuple[nn.Linear, nn.LayerNorm]]) -> DrafterEntry:
        """A layer each: the states become keys and values of its cross-attention."""
        remember, remember_bias = stack([affine(linear, norm) for linear, norm in key_values])
        return self._replace(remember=remember, remember_bias=remember_bias)


def _packed(*shape: int) -> np.ndarray:
    return np.zeros((*shape, kernels.PANEL), np.float32)

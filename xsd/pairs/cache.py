"""The key-value cache: memory allocated once, a length that only an integer moves."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class KVCache:
    """Keys and values of every layer in two buffers of fixed size.

    ``length`` is the number of valid positions. Rolling back rejected drafts is an assignment to
    it: what lies beyond is overwritten by the next rows.

    Rows of a batch may have prompts of different lengths; shorter ones are padded on the left,
    and ``pad`` holds how many of a row's first positions are padding.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_layers, batch, num_heads, max_length, head_dim)
        self.keys: Float[Tensor, "layers B heads length head_dim"]
        self.values: Float[Tensor, "layers B heads length head_dim"]
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.pad: Int[Tensor, " B"] | None = None
        self._layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))

    @property
    def batch(self) -> int:
        return int(self.keys.shape[1])

    @property
    def max_length(self) -> int:
        return int(self.keys.shape[3])

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def reset(self) -> None:
        self.length = 0
        self.pad = None

    def append(
        self,
        layer: int,
        keys: Float[Tensor, "B heads R head_dim"],
        values: Float[Tensor, "B heads R head_dim"],
    ) -> tuple[Tensor, Tensor]:
        """Write R rows behind ``length`` and return views of everything up to their end.

        ``length`` itself moves once a pass, after the last layer (``advance``).
        """
        end = self.length + keys.shape[2]
        all_keys, all_values = self._layers[layer]
        all_keys[:, :, self.length : end] = keys
        all_values[:, :, self.length : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def advance(self, num_rows: int) -> None:
        self.length += num_rows

    def expand_from(self, prefix: KVCache) -> None:
        """Start every row of this cache with the one row of ``prefix`` (a shared visual prefix)."""
        length = prefix.length
        self.keys[:, :, :, :length] = prefix.keys[:, :1, :, :length]
        self.values[:, :, :, :length] = prefix.values[:, :1, :, :length]
        self.length = length

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> KVCache:
        """A smaller cache with the given batch rows (finished answers retire)."""
        kept = KVCache.__new__(KVCache)
        kept.keys = self.keys.index_select(1, rows)
        kept.values = self.values.index_select(1, rows)
        kept.length = self.length
        kept.pad = None if self.pad is None else self.pad.index_select(0, rows)
        kept._layers = list(zip(kept.keys.unbind(0), kept.values.unbind(0), strict=True))
        return kept

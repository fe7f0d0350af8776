"""Small random streams that every level can read."""

from __future__ import annotations

import pytest
import torch

from xsd.adapters.base import Adapter, Streams
from xsd.adapters.catalog import build, configure
from xsd.adapters.config import AdapterSizes

D_DRAFTER, D_VERIFIER = 24, 32
SIZES = AdapterSizes(
    bottleneck_dim=8, num_heads=4, ffn_dim=48, num_layers=2, max_positions=24, dropout=0.1
)


def make_adapter(name: str, *, sizes: AdapterSizes = SIZES, equal: bool = False) -> Adapter:
    """An adapter with every parameter off its special initial value, in eval mode."""
    torch.manual_seed(0)
    adapter = build(configure(name, D_VERIFIER if equal else D_DRAFTER, D_VERIFIER, sizes))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter.eval()


def make_streams(batch: int = 3, length: int = 9, d_drafter: int = D_DRAFTER) -> Streams:
    random = torch.Generator().manual_seed(1)
    lengths = torch.arange(batch) * 2 + length - 2 * (batch - 1)
    return Streams(
        drafter=torch.randn(batch, length, d_drafter, generator=random),
        verifier=torch.randn(batch, length, D_VERIFIER, generator=random),
        token=torch.randn(batch, length, D_VERIFIER, generator=random),
        visual=torch.randn(batch, 5, D_VERIFIER, generator=random),
        ids=torch.randint(0, 50, (batch, length), generator=random),
        mask=torch.arange(length) < lengths[:, None],
    )


@pytest.fixture
def streams() -> Streams:
    return make_streams()

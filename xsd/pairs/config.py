"""Which pair, from where, in which precision. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PairConfig:
    """The model pair of a stage."""

    pair: str = "tiny"
    """Pair of the catalog: tiny (embedded) or eventgpt-video-llava."""
    drafter: str | None = None
    """Folder or hub id of the drafter; null: the pair's own default."""
    verifier: str | None = None
    """Folder or hub id of the verifier; null: the pair's own default."""
    quant: str | None = None
    """4bit, 8bit, fp16, bf16 or fp32; null: the pair's own default."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the first GPU, else the CPU."""

"""``xsd levels``: what every adapter level reads, predicts and weighs."""

from __future__ import annotations

from dataclasses import dataclass

from xsd.cli import main
from xsd.errors import XsdError

HELP = "list the adapter levels with inputs, shift, parameters and selection metric"


@dataclass(frozen=True)
class Config:
    """Options of the listing."""

    dim: int = 4096
    """Width of both models' hidden states."""
    ffn_dim: int = 2048
    """Width of the feed-forward layers (L4 and up)."""


def run(config: Config) -> None:
    from xsd.adapters.catalog import LEVELS, num_parameters
    from xsd.adapters.config import AdapterSizes

    if config.dim < 8 or config.dim % 8:
        raise XsdError(f"--dim {config.dim}: must be a positive multiple of the 8 attention heads")
    sizes = AdapterSizes(ffn_dim=config.ffn_dim)
    rows = [
        ("level", "published no.", "inputs", "shift", "parameters", "selected by", "what it is")
    ]
    rows += [
        (
            row.name,
            str(row.number or "-"),
            row.inputs,
            str(row.shift),
            f"{num_parameters(row.name, config.dim, sizes):,}",
            row.selection_metric,
            row.description,
        )
        for row in LEVELS.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    raise SystemExit(main(command="levels"))

"""What can be asked of a search. Free of torch and Optuna, so that ``--help`` stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xsd.errors import XsdError


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    num_trials: int = 8
    """Trials of the study, those of an earlier, interrupted sweep included."""
    space: Path | None = None
    """YAML file of what to search; null: experiments/sweep_<level>.yaml, else sweep.yaml there."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Stops trials that fall behind: below the median of the others, or by Hyperband's brackets."""
    num_startup_trials: int = 4
    """Random trials before the sampler learns from them and the median prunes."""
    output_dir: Path = Path("outputs/sweep")
    """Where studies and trial checkpoints are kept; a sweep of the same question goes on there."""

    def __post_init__(self) -> None:
        if self.num_trials < 1:
            raise XsdError(f"num_trials={self.num_trials}: must be at least 1")
        if self.num_startup_trials < 0:
            raise XsdError(f"num_startup_trials={self.num_startup_trials}: must not be negative")

"""What can be asked of a search. Free of torch and Optuna, so that ``--help`` stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xsd.errors import XsdError

ObjectiveName = Literal["accept_length", "latency_ms"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    num_trials: int = 8
    """Trials of the study (also --n_trials), those of other processes and interrupted sweeps of the
    same question included."""
    space: Path | None = None
    """YAML file of what to search; null: experiments/sweep_<level>.yaml, else that of its family
    (bottleneck: L1-L3, gap: L4 and X1, decode: heads)."""
    objectives: tuple[ObjectiveName, ...] = ("accept_length",)
    """accept_length: validation accept length; accept_length,latency_ms: against the measured time
    of one drafted token, without pruning."""
    pruner: Literal["hyperband", "median", "none"] = "hyperband"
    """Stops trials that fall behind: by Hyperband's brackets, or below the median of the others."""
    num_startup_trials: int = 4
    """Random trials before the sampler learns from them and the median prunes."""
    num_workers: int = 1
    """Trials that run at the same time, each in a process of its own."""
    storage: str | None = None
    """Where the study is kept: an SQLAlchemy URL, or a journal file on a disk that all machines
    see; null: $XSD_STORAGE, else a journal in output_dir. Passwords go into $XSD_STORAGE."""
    stale_minutes: float = 60.0
    """A trial of another machine that reports no epoch for so long is searched again."""
    output_dir: Path = Path("outputs/sweep")
    """Where trials keep their checkpoints while they run."""

    def __post_init__(self) -> None:
        for name in ("num_trials", "num_workers"):
            if getattr(self, name) < 1:
                raise XsdError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_startup_trials < 0:
            raise XsdError(f"num_startup_trials={self.num_startup_trials}: must not be negative")
        if not self.stale_minutes > 0:
            raise XsdError(f"stale_minutes={self.stale_minutes}: must be above 0")
        if self.objectives[:1] != ("accept_length",) or len({*self.objectives}) != len(
            self.objectives
        ):
            raise XsdError("objectives: accept_length, or accept_length,latency_ms")

"""The new rows of a live step, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

Positions = slice | Int[Tensor, "*batch R"]
"""Answer positions of the rows of a pass: one stretch, or on the device, where each batch row may
have its own."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The new rows of a cached step; a stream that the level does not read stays None.

    Row ``r`` stands at answer position ``cache.length + r``. E2's drafter states run one position
    ahead: rows at positions n..m need states e[n+1..m+1], and e[0] too when n is 0.
    """

    drafter: Float[Tensor, "B _ Dd"] | None = None
    verifier: Float[Tensor, "B R Dv"] | None = None
    token: Float[Tensor, "B R Dv"] | None = None
    """As ``Adapter.read_tokens`` gives them."""


@dataclass(frozen=True, slots=True)
class Siblings:
    """How the rows of a cached step stand in a draft tree: at one position, in many branches."""

    position: int
    """Answer position of them all."""
    visible: Bool[Tensor, "R end"]
    """Cached rows, these included, that each of them follows."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """How the rows of a cached step stand where every batch row has come to another place."""

    positions: Int[Tensor, "B R"]
    """Answer positions; those of a batch row ascend, and its cache is valid before the first."""
    end: int
    """One more than the largest of them."""

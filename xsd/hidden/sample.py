"""What is stored of an answer and of its clip, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HiddenSample:
    """The paired decoder states of one answer.

    Teacher-forced: both models were fed the verifier's answer, so the two id rows are equal and
    ``drafter_hidden[t]`` pairs with ``verifier_hidden[t]``. Free-running: each model decoded on its
    own, the lengths differ, and nothing is cut.
    """

    key: str
    drafter_hidden: Float[Tensor, "Td Dd"]
    verifier_hidden: Float[Tensor, "T Dv"]
    drafter_ids: Int[Tensor, " Td"]
    verifier_ids: Int[Tensor, " T"]
    verifier_layers: Float[Tensor, "T layers Dv"] | None = None
    """Outputs of further layers at the same positions, before the final norm; None: not kept."""

    @property
    def scene_key(self) -> str:
        return self.key.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class ClipVisual:
    """What every question of a clip shares: the verifier's visual states, pooled to K vectors."""

    scene_key: str
    projected: Float[Tensor, "K Dv"]
    """Before the language model: exists long before the verifier's prefill ends."""
    prefilled: Float[Tensor, "K Dv"]
    """After the last layer and the final norm: exists when the verifier's prefill ends."""

"""Random numbers that answers, and their drafts, are drawn with."""

from __future__ import annotations

import math
import random

import torch
from jaxtyping import Float
from torch import Tensor

from xsd.pairs.device import to_device


class Draws:
    """Random numbers of an answer, for one purpose.

    Drafts are not drawn with the verifier's: a draft must not know what it will be held against.
    They are no other answer's: of answers that share their drafts each follows the verifier, over
    all seeds, but together they do not. And they begin anew in every cycle, so that how much was
    drawn before, and for whom, changes nothing. They come from the host: every device draws with
    the same ones, and none waits for them.
    """

    def __init__(
        self, purpose: str, seed: int, device: torch.device, name: str | None = None
    ) -> None:
        self.name = name
        """The answer's, as in ``Engine.name_draws``."""
        self._purpose, self._seed, self._device = purpose, seed, device
        self._numbers = random.Random()

    def behind(self, num_said: int, *shape: int) -> Float[Tensor, "*shape"]:
        """Those of the cycle that begins behind so many tokens: uniform on [0, 1), in double
        precision. Whoever asks for fewer rows gets the first of them."""
        self._numbers.seed(f"{self._purpose} {self._seed} {num_said} {self.name}")
        found = [self._numbers.random() for _ in range(math.prod(shape))]
        return to_device(found, self._device, torch.double).view(shape)

"""Killed anywhere and started again, pretraining ends with the weights it would have had."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learning import test_pretrain
from tests.learning.test_pretrain import CONFIG
from xsd.errors import XsdError
from xsd.learning.pretrain import state as state_module
from xsd.learning.pretrain.corpus import Corpus
from xsd.learning.pretrain.state import Progress
from xsd.learning.pretrain.train import TinyModels, pretrain_one
from xsd.scenes.language import House

corpus = test_pretrain.corpus
SHORT = replace(CONFIG, facts_batch=2, gathering_batch=2, facts_epochs=2)


@cache
def fresh() -> TinyModels:
    return TinyModels.new(SHORT)


class Killed(BaseException):
    pass


def trained(house: House, corpus: Corpus, states: Path | None) -> tuple[Any, list[Any]]:
    models = copy.deepcopy(fresh())
    return getattr(models, house), list(pretrain_one(house, SHORT, corpus, models, states))


@pytest.mark.parametrize("house", ["verifier", "drafter"])
def test_killed_at_every_step(
    house: House,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state_module, "_STATE_SECONDS", -1.0)
    monkeypatch.setattr(state_module, "_STATE_SHARE", 1e9)
    whole, reports = trained(house, corpus, None)
    steps: list[tuple[str, int]] = []
    draw, left = random.Random(0), 0

    save = Progress.save

    def killing(self: Progress) -> None:
        nonlocal left
        left -= 1
        if left == 0 and draw.random() < 0.5:
            raise Killed
        save(self)
        steps.append((self._phase, self._step))
        if left == 0:
            raise Killed

    monkeypatch.setattr(Progress, "save", killing)
    kills = 0
    while True:
        left = draw.randrange(4, 8)
        try:
            again, last = trained(house, corpus, tmp_path / "states")
            break
        except Killed:
            kills += 1
    assert kills >= 2
    # Killed behind its last step, it has nothing left to tell.
    assert last[-1:] in ([], reports[-1:])
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    # A phase that is finished is not begun again.
    phases = [state_module.PHASES.index(phase) for phase, _ in steps]
    assert phases == sorted(phases)


def test_another_configuration_does_not_go_on(
    corpus: Corpus,
    tmp_path: Path,
) -> None:
    models = copy.deepcopy(fresh())
    list(pretrain_one("drafter", SHORT, corpus, models, tmp_path))
    with pytest.raises(XsdError, match="another configuration; remove it"):
        list(pretrain_one("drafter", replace(SHORT, seed=1), corpus, models, tmp_path))

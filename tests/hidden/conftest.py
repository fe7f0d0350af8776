from __future__ import annotations

from pathlib import Path

import pytest

from tests.hidden import miniature
from xsd.pairs.base import ModelPair
from xsd.scenes.dsec import load_index
from xsd.types import Scene


@pytest.fixture(scope="session")
def pair() -> ModelPair:
    return miniature.pair()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.save_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def scenes(dataset: Path) -> list[Scene]:
    return load_index(dataset)

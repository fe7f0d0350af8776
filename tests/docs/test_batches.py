"""The page on batches says what the configuration says."""

from __future__ import annotations

import re
from pathlib import Path

from xsd.bench_config import BenchConfig
from xsd.config import resolved
from xsd.decoding.strategies import batchable, parse_all

PAGE = (Path(__file__).parents[2] / "docs/batches.md").read_text()


def test_every_flag_has_its_default() -> None:
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \|", PAGE, flags=re.M)
    values = resolved(BenchConfig())
    assert {name for name, _ in rows} == {"batch_size", "share_visual"}
    assert {name: str(values[name]).lower() for name, _ in rows} == dict(rows)


def test_every_head_that_serves_a_batch_is_named() -> None:
    fit, _ = batchable(parse_all("all", 4))
    [drafting] = re.findall(r"\*\*Who drafts\.\*\*(.*?)\n\n", PAGE, flags=re.S)
    for strategy in fit[1:]:
        assert strategy.name.removesuffix("_decode") in drafting

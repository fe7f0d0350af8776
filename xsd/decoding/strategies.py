"""Names of the benchmark's rows -> ``Strategy`` records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from xsd.config import LEVELS
from xsd.decoding.config import (
    AGAIN,
    ALL_CONFIGS,
    BASELINE,
    CONTROL_HEADS,
    GAP_LEVELS,
    GOING_ON,
    HEAD_LEVELS,
    TREE_HEADS,
    DecodingConfig,
)
from xsd.errors import XsdError
from xsd.files import read_json
from xsd.types import Strategy


def parse(name: str, gamma: int) -> Strategy:
    """``vl_baseline``, ``vl_baseline:again`` (an A/A test), ``L4+VL``, ``L4+VL:free``,
    ``E3_decode``, ``E3_tree``, ``X1+E3``, ``X1+drafter``, ``drafter+VL``, ``template+VL``,
    ``text``, ``ngram``, ``oracle``, ``synthetic:0.8`` (or a rate a position,
    ``synthetic:0.9,0.7``, or a JSON file of them), or any of them with ``@shuffled_events``.

    Raises:
        XsdError: unknown name; the message lists the known ones.
    """
    base, _, control = name.partition("@")
    if control not in ("", "shuffled_events"):
        raise XsdError(f"config {name!r}: unknown control {control!r}; only @shuffled_events")
    strategy = _parse_base(base, gamma)
    return replace(strategy, name=name, shuffled_events=bool(control))


def parse_all(names: str, gamma: int, control: str | None = None) -> list[Strategy]:
    """A comma-separated list, or 'all'; the baseline always leads.

    Args:
        control: ``shuffled_events`` adds every config that uses the drafter once more.

    Raises:
        XsdError: an unknown name or control.
    """
    # A bare number belongs to the list of rates before it.
    split = re.split(r",(?!\s*[.\d]+\s*(?:[,@+]|$))", names)
    listed = ALL_CONFIGS if names == "all" else tuple(name.strip() for name in split)
    found = [parse(name, gamma) for name in dict.fromkeys((BASELINE, *listed))]
    if control is None:
        return found
    again = [s.name for s in found if needs_drafter(s) and not s.shuffled_events]
    return found + [parse(f"{name}@{control}", gamma) for name in again]


def _parse_base(name: str, gamma: int) -> Strategy:
    if name in (BASELINE, AGAIN):
        return Strategy(name)
    if name in ("drafter+VL", "template+VL"):
        return Strategy(name, gap=name.partition("+")[0], gap_mode="free")
    if name.endswith("_decode") and name.removesuffix("_decode") in HEAD_LEVELS:
        return Strategy(name, head=name.removesuffix("_decode"), gamma=gamma)
    if name.endswith("_tree") and name.removesuffix("_tree") in TREE_HEADS:
        return Strategy(name, head=name.removesuffix("_tree"), gamma=gamma, tree=True)
    if _is_control(name):
        return Strategy(name, head=name, gamma=gamma)
    gap, _, rest = name.partition("+")
    if gap in GAP_LEVELS and rest == "VL":
        return Strategy(name, gap=gap)
    if gap in GAP_LEVELS and rest == "VL:free":
        return Strategy(name, gap=gap, gap_mode="free")
    if gap in GAP_LEVELS and (rest in (*HEAD_LEVELS, GOING_ON) or _is_control(rest)):
        return Strategy(name, gap=gap, head=rest, gamma=gamma)
    raise XsdError(
        f"config {name!r} is unknown; known: {', '.join(ALL_CONFIGS)}, any GAP+HEAD, "
        "and each with @shuffled_events"
    )


def _is_control(name: str) -> bool:
    head, _, rates = name.partition(":")
    if head == "synthetic" and rates:
        acceptance_rates(rates)
    return head in CONTROL_HEADS and bool(rates) == (head == "synthetic")


def acceptance_rates(text: str) -> list[float]:
    """``0.8``, ``0.9,0.7`` or a JSON file with such a list.

    Raises:
        XsdError: anything else, or a number that is no rate.
    """
    try:
        found = read_json(Path(text)) if text.endswith(".json") else text.split(",")
        rates = [float(item) for item in found]
    except (TypeError, ValueError) as error:
        raise XsdError(
            f"config synthetic:{text}: write synthetic:0.8, synthetic:0.9,0.7 or a JSON file that "
            f"holds a list of rates ({error})"
        ) from error
    if not rates or not all(0.0 <= rate <= 1.0 for rate in rates):
        raise XsdError(f"config synthetic:{text}: every rate must be between 0 and 1")
    return rates


def needs_drafter(strategy: Strategy) -> bool:
    """Whether the drafter model runs at all."""
    return strategy.gap not in (None, "template") or strategy.head in ("L5", "L5F", "E2")


def goes_on(strategy: Strategy) -> bool:
    """Whether drafter and gap adapter draft in decode too, behind what the verifier has said."""
    return strategy.head == GOING_ON


def config_of(adapter: str) -> str:
    """The config in which an adapter drafts alone: ``E3`` -> ``E3_decode``, ``L4:free`` ->
    ``L4+VL:free``."""
    level, _, mode = adapter.partition(":")
    if level in GAP_LEVELS:
        return f"{level}+VL:{mode}" if mode else f"{level}+VL"
    return level if level in CONTROL_HEADS else f"{level}_decode"


def metric_name(strategy: str) -> str:
    """A strategy in a metric's key, where few characters are allowed: ``L4+VL`` -> ``L4_VL``."""
    return re.sub(r"[^\w.-]+", "_", strategy)


def strict_rows(strategies: Iterable[Strategy], config: DecodingConfig) -> int | None:
    """The one row shape of ``--strict``: rows of the largest pass of any of them; None: not asked
    for."""
    if not config.strict:
        return None
    rows = [1]
    for strategy in strategies:
        if strategy.gap is not None:
            # The first draft is checked by the prefill, and the token said then is a row.
            rows.append(min(config.max_gap_drafts, config.max_new_tokens))
        if strategy.head is not None:
            rows.append(1 + (config.tree_nodes if strategy.tree else strategy.gamma))
    return max(rows)


def batchable(strategies: Sequence[Strategy]) -> tuple[list[Strategy], list[Strategy]]:
    """Those that decode a batch, and the rest.

    A batch has chains from heads that look at the verifier alone: no gap, no drafter, no trees.
    """
    fit = [s for s in strategies if s.gap is None and not s.tree and not needs_drafter(s)]
    return fit, [s for s in strategies if s not in fit]


def adapter_names(strategy: Strategy) -> list[str]:
    """Adapters it loads: levels, and ``L4:free`` for one trained on free-running pairs."""
    names = []
    if strategy.gap in GAP_LEVELS:
        names.append(f"{strategy.gap}:free" if strategy.gap_mode == "free" else str(strategy.gap))
    if strategy.head in LEVELS:
        names.append(strategy.head)
    return names

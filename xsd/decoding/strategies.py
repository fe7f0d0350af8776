"""Names of the benchmark's rows -> ``Strategy`` records."""

from __future__ import annotations

from dataclasses import replace

from xsd.decoding.config import ALL_CONFIGS, BASELINE, GAP_LEVELS, HEAD_LEVELS
from xsd.errors import XsdError
from xsd.types import Strategy


def parse(name: str, gamma: int) -> Strategy:
    """``L4+VL``, ``L4+VL:free``, ``E3_decode``, ``X1+E3``, ``drafter+VL``, ``template+VL``, or
    any of them with ``@shuffled_events``.

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
    listed = ALL_CONFIGS if names == "all" else tuple(name.strip() for name in names.split(","))
    found = [parse(name, gamma) for name in dict.fromkeys((BASELINE, *listed))]
    if control is None:
        return found
    again = [s.name for s in found if needs_drafter(s) and not s.shuffled_events]
    return found + [parse(f"{name}@{control}", gamma) for name in again]


def _parse_base(name: str, gamma: int) -> Strategy:
    if name == BASELINE:
        return Strategy(name)
    if name in ("drafter+VL", "template+VL"):
        return Strategy(name, gap=name.partition("+")[0], gap_mode="free")
    if name.endswith("_decode") and name.removesuffix("_decode") in HEAD_LEVELS:
        return Strategy(name, head=name.removesuffix("_decode"), gamma=gamma)
    gap, _, rest = name.partition("+")
    if gap in GAP_LEVELS and rest == "VL":
        return Strategy(name, gap=gap)
    if gap in GAP_LEVELS and rest == "VL:free":
        return Strategy(name, gap=gap, gap_mode="free")
    if gap in GAP_LEVELS and rest in HEAD_LEVELS:
        return Strategy(name, gap=gap, head=rest, gamma=gamma)
    raise XsdError(
        f"config {name!r} is unknown; known: {', '.join(ALL_CONFIGS)}, any GAP+HEAD, "
        "and each with @shuffled_events"
    )


def needs_drafter(strategy: Strategy) -> bool:
    """Whether the drafter model runs at all."""
    return strategy.gap not in (None, "template") or strategy.head in ("L5", "L5F", "E2")


def adapter_names(strategy: Strategy) -> list[str]:
    """Adapters it loads: levels, and ``L4:free`` for one trained on free-running pairs."""
    names = []
    if strategy.gap in GAP_LEVELS:
        names.append(f"{strategy.gap}:free" if strategy.gap_mode == "free" else str(strategy.gap))
    if strategy.head is not None:
        names.append(strategy.head)
    return names

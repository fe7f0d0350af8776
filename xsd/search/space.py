"""What is searched: a YAML file of names and ranges."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from xsd.errors import XsdError

Space = Mapping[str, BaseDistribution]

_KINDS: Final[Mapping[str, type[BaseDistribution]]] = {
    "float": FloatDistribution,
    "int": IntDistribution,
    "categorical": CategoricalDistribution,
}


def read_space(path: Path, allowed: Collection[str]) -> Space:
    """Read ``name -> {type: float|int|categorical, low, high, log, step, choices}``.

    Raises:
        XsdError: unreadable, a name that is not ``allowed``, or a range that is none.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise XsdError(f"{path}: cannot be read as YAML ({error}); check --space") from error
    if not isinstance(values, dict) or not values:
        raise XsdError(f"{path}: a search space maps names to ranges")
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise XsdError(f"{path}: {unknown[0]!r} cannot be searched; it is no option of training")
    return {name: _distribution(path, name, value) for name, value in values.items()}


def choices(space: Space, name: str) -> tuple[Any, ...]:
    """What a categorical of the space may be; empty: it is not searched, or no categorical."""
    found = space.get(name)
    return tuple(found.choices) if isinstance(found, CategoricalDistribution) else ()


def _distribution(path: Path, name: str, value: Any) -> BaseDistribution:
    if not isinstance(value, dict) or value.get("type") not in _KINDS:
        raise XsdError(f"{path}: {name}: 'type' must be one of {', '.join(_KINDS)}")
    options = {key: item for key, item in value.items() if key != "type"}
    try:
        return _KINDS[value["type"]](**options)
    except (TypeError, ValueError) as error:
        raise XsdError(f"{path}: {name}: {error}") from error

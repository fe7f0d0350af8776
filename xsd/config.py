"""Configuration: a flat dataclass, overridden by a YAML recipe, overridden by flags.

A recipe has one section a stage, beside the keys that all stages share::

    pair: tiny
    seed: 0
    train:
      num_epochs: 40
    train.L4:            # on top of ``train``, for this level only
      num_epochs: 60

Flags read ``--key value`` or ``--key=value``; hyphens and underscores are the same. A boolean may
stand alone (``--strict``) or take ``true|false``. ``null`` means none for a field that may be none
but is not by default; for every other field it means "not given", which is how MLproject, having
no optional parameters, leaves a choice to the recipe.

This module imports no library at its top: room configurations import it for ``Level``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from xsd.errors import XsdError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")
Values = dict[str, Any]
SectionClasses = Callable[[str], type | None]
"""Stage name -> its configuration dataclass; None: there is no such stage."""

LEVELS: Final = ("L1", "L2", "L3", "L4", "L5", "L5F", "B1", "E1", "E2", "E3", "X1", "text")
_CANONICAL: Final = {name.upper(): name for name in LEVELS}
SEED_NUMBERS: Final = {"1": "L1", "2": "L2", "3": "L3", "4": "L4", "5": "L5", "6": "L5F"}
SHARED_KEYS: Final = frozenset(
    {"pair", "drafter", "verifier", "tower", "weights", "num_event_images"}
    | {"seed", "device", "device_map", "quant"}
)
"""What a recipe may say once, above its sections."""


class Level(str):
    """The canonical name of an adapter level, from any of its spellings: ``4``, ``'L4'``, ``l4``.

    Raises:
        XsdError: no such level.
    """

    __slots__ = ()

    def __new__(cls, value: str | int) -> Level:
        spelled = str(value).strip()
        name = SEED_NUMBERS.get(spelled) or _CANONICAL.get(spelled.upper())
        if name is None:
            raise XsdError(f"unknown level {value!r}; choose 1-6 or one of {', '.join(LEVELS)}")
        return super().__new__(cls, name)


def variant(tags: Mapping[str, object]) -> str:
    """``L4``, ``L4:feature`` or ``L4:free``: an adapter by its run's level, loss, conditioning."""
    name = str(tags.get("level") or "")
    if name not in LEVELS:
        return name
    if tags.get("conditioning") == "free_running":
        return f"{name}:free"
    return f"{name}:feature" if tags.get("loss") == "feature" else name


def parse(
    config_class: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    epilog: str = "",
    sections: SectionClasses | None = None,
) -> T:
    """Build a configuration from defaults, ``--config recipe.yaml`` and flags, in rising order.

    The recipe's section is the last word of ``prog``. With ``sections``, the keys of all other
    sections are checked too, so that a slip is found before the first stage runs.

    Raises:
        XsdError: an unknown flag, section or key, or a value of another type.
        SystemExit: code 0, after ``--help``.
    """
    section = prog.split()[-1]
    parser = _parser(config_class, prog, description, epilog)
    flags = _flags(config_class, argv, prog)
    if "help" in flags:
        parser.parse_args(["--help"])
    path = flags.pop("config", None)
    where = f"{path}: " if path is not None else ""
    if path is not None and "recipe" in {field.name for field in dataclasses.fields(config_class)}:  # type: ignore[arg-type]
        # ``main`` hands its recipe on to the stages.
        flags.setdefault("recipe", path)
    recipe = {} if path is None else _read_recipe(Path(path), section, config_class, sections)
    merged = _merge(parser, recipe, [section], flags, config_class, where)
    variant = f"{section}.{merged.get('level')}"
    if variant in recipe:
        merged = _merge(parser, recipe, [section, variant], flags, config_class, where)
    try:
        built = parser.instantiate(merged)
        names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
        made = config_class(**{name: built[name] for name in names})
        _check_all(made)
    except ValueError as error:
        raise XsdError(_one_line(error)) from error
    return made


def _check_all(config: Any) -> None:
    """A command's configuration has several parents, of whose checks Python runs the first only."""
    for parent in type(config).__mro__:
        if check := vars(parent).get("__post_init__"):
            check(config)


def resolved(config: Any) -> dict[str, str | int | float | bool]:
    """A configuration as flat scalars, for logging.

    None is ``"null"``, a list is JSON, and a nested dataclass gives ``outer.inner``.
    """
    values: dict[str, str | int | float | bool] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= {f"{field.name}.{key}": item for key, item in resolved(value).items()}
        else:
            values[field.name] = _scalar(value)
    return values


def _scalar(value: Any) -> str | int | float | bool:
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return str(value)
    return json.dumps(value, default=str)


def _parser(config_class: type, prog: str, description: str, epilog: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_parsing_settings
    from jsonargparse.typing import register_type

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    register_type(Level, str, Level, fail_already_registered=False)
    parser = ArgumentParser(
        prog=prog, description=description, epilog=epilog, exit_on_error=False, default_env=False
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Recipe; flags override it.")
    _resolve_annotations(config_class)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def _resolve_annotations(config_class: type) -> None:
    """Put types in place of the strings that a postponed annotation is.

    Left to itself, jsonargparse would execute the ``TYPE_CHECKING`` blocks of every module in
    question: seconds of imports, and names that shadow those meant here.
    """
    kinds = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        field.type = kinds[field.name]
        if dataclasses.is_dataclass(field.type):
            _resolve_annotations(typing.cast(type, field.type))
    # What wraps the constructor (the tests' type checker) is looked through, as a signature does.
    inspect.unwrap(vars(config_class)["__init__"]).__annotations__ = kinds


@dataclasses.dataclass(frozen=True, slots=True)
class _Option:
    """A field of a configuration, as a flag."""

    kind: Any
    default: Any

    @property
    def null_is_a_value(self) -> bool:
        return type(None) in typing.get_args(self.kind) and self.default is not None


def _options(config_class: type) -> dict[str, _Option]:
    """All flags of a configuration; a field of a nested dataclass is ``outer.inner``."""
    options = {"config": _Option(str | None, None)}
    kinds = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = kinds[field.name]
        options[field.name] = _Option(kind, field.default)
        if dataclasses.is_dataclass(kind):
            nested = _options(typing.cast(type, kind))
            options |= {f"{field.name}.{key}": value for key, value in nested.items()}
    return options


def _flags(config_class: type, argv: Sequence[str], prog: str) -> dict[str, str]:
    """Split ``argv`` into key -> text; the last of a repeated flag wins."""
    options = _options(config_class)
    flags: dict[str, str] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token in ("-h", "--help"):
            return {"help": ""}
        if not token.startswith("--"):
            raise XsdError(f"unexpected argument {token!r}; flags read --name value")
        name, equals, text = token[2:].partition("=")
        key = name.replace("-", "_")
        if key not in options:
            raise XsdError(
                f"unknown flag --{name}{_similar(key, options)}; {prog} --help lists them all"
            )
        option = options[key]
        if not equals:
            text = _take_value(tokens, bare=option.kind is bool, name=name)
        if text == "null" and not option.null_is_a_value:
            flags.pop(key, None)
            continue
        flags[key] = _as_list(text) if _is_sequence(option.kind) else text
    return flags


def _take_value(tokens: list[str], *, bare: bool, name: str) -> str:
    """The value after a flag; a boolean flag may do without."""
    following = tokens[0] if tokens else None
    if bare and (following is None or following.lower() not in ("true", "false", "null")):
        return "true"
    if following is None or following.startswith("--"):
        raise XsdError(f"flag --{name} needs a value")
    return tokens.pop(0)


def _is_sequence(kind: Any) -> bool:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_is_sequence(choice) for choice in typing.get_args(kind))
    return typing.get_origin(kind) in (tuple, list, Sequence)


def _as_list(text: str) -> str:
    """``a,b`` -> ``["a", "b"]``; text that is a list already, or null, stays."""
    if text.startswith("[") or text == "null":
        return text
    return json.dumps([item.strip() for item in text.split(",") if item.strip()])


def _read_recipe(
    path: Path, section: str, config_class: type, sections: SectionClasses | None
) -> dict[str, Any]:
    """Read a recipe and refuse every key that no stage knows.

    Shared keys stay at the top; every section is a mapping.
    """
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise XsdError(f"{path}: cannot be read ({error.strerror}); check --config") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise XsdError(f"{path}: cannot be read as YAML ({_one_line(error)}); mend it") from error
    if not isinstance(recipe, dict):
        raise XsdError(f"{path}: a recipe is a mapping of sections, one a stage")
    for key, values in recipe.items():
        if key in SHARED_KEYS:
            continue
        stage, _, variant = str(key).partition(".")
        known = config_class if stage == section else sections(stage) if sections else None
        if known is None and (sections or not isinstance(values, Mapping)):
            raise XsdError(
                f"{path}: unknown section or shared key {key!r};"
                f" shared keys are {', '.join(sorted(SHARED_KEYS))}"
            )
        if variant:
            Level(variant)
        recipe[key] = {} if values is None else values
        if known is not None:
            _check_section(path, str(key), recipe[key], known)
    return recipe


def _check_section(path: Path, name: str, values: Any, config_class: type) -> None:
    if not isinstance(values, Mapping):
        raise XsdError(f"{path}: section {name!r} must be a mapping of keys to values")
    kinds = typing.get_type_hints(config_class)
    for key, value in values.items():
        if key not in kinds:
            raise XsdError(f"{path}: section {name!r}: unknown key {key!r}{_similar(key, kinds)}")
        if dataclasses.is_dataclass(kinds[key]):
            _check_section(path, f"{name}.{key}", value, typing.cast(type, kinds[key]))


def _merge(
    parser: ArgumentParser,
    recipe: Mapping[str, Any],
    sections: Sequence[str],
    flags: Mapping[str, str],
    config_class: type,
    where: str = "",
) -> Namespace:
    """Defaults, then the recipe's shared keys and ``sections`` in order, then flags."""
    kinds = {key: option.kind for key, option in _options(config_class).items()}
    values = {key: value for key, value in recipe.items() if key in SHARED_KEYS and key in kinds}
    for section in sections:
        values.update(recipe.get(section, {}))
    try:
        namespace = parser.parse_object(values)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise _refusal(error, where, values, kinds) from error
    try:
        return parser.parse_args([f"--{key}={text}" for key, text in flags.items()], namespace)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise _refusal(error, "--", flags, kinds) from error


def _refusal(
    error: BaseException, where: str, values: Mapping[str, Any], kinds: Mapping[str, Any]
) -> XsdError:
    """The library's several lines about a value of a wrong type, as one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, XsdError):
            return cause
        cause = cause.__cause__ or cause.__context__
    named = re.search(r'key "([\w.]+)"', str(error))
    if named is None or named[1] not in values:
        return XsdError(_one_line(error))
    key = named[1]
    return XsdError(f"{where}{key}: {values[key]!r} is not {_kind_in_words(kinds[key])}")


def _kind_in_words(kind: Any) -> str:
    if kind is type(None):
        return "null"
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, choices))}"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(_kind_in_words(choice) for choice in choices)
    if _is_sequence(kind):
        return f"a list of {_kind_in_words(choices[0])}"
    return {"bool": "true or false"}.get(kind.__name__, f"{kind.__name__}")


def _similar(key: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(key), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

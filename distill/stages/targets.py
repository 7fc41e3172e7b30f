"""Configs that name a class (`_target_`): their options are held against the signature of its constructor before anything
runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from distill.typed import parse, unknown_key

SCALARS = (int, float, bool, str, None, NoneType, Any)
CONTAINERS = (list, tuple, dict, Sequence, Mapping)


def resolve(config: Any, where: str) -> Callable[..., Any]:
    """The class or function that `config` names. Raises ValueError naming the place."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}: found {config!r}, expected a mapping with _target_")
    if not isinstance(target := config.get("_target_"), str):
        found = f"found {target!r}" if "_target_" in config else "missing"
        raise ValueError(f"{where}._target_: {found}; expected a class, such as distill.nets.unet.UNet")
    try:
        found = get_object(target)
    except Exception as error:  # whatever the import of somebody's module raises
        told = " ".join(str(error).split())
        raise ValueError(f"{where}._target_: found {target!r}, which cannot be imported: {told}") from error
    if not callable(found):
        raise ValueError(f"{where}._target_: found {target!r}, expected a class or a function")
    return found


def check_targets(config: Any, where: str) -> None:
    """Check every config with a `_target_` in plain containers, at every depth: options that its constructor does not
    take, and values of another type than it declares, raise ValueError with the dotted place."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_targets(value, f"{where}.{key}")
        if "_target_" in config:
            check_options(resolve(config, where), config, where)
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            check_targets(value, f"{where}[{number}]")


def check_options(target: Callable[..., Any], config: Mapping[str, Any], where: str) -> None:
    """Check the options of one config against the signature of what it names."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # compiled: it has no signature
        return
    hints = _hints(target)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    for key, value in config.items():
        if key == "_target_":
            continue
        if key not in known and not anything:
            raise ValueError(unknown_key(where, str(key), known))
        if key in hints and _plain(hints[key]):
            parse(hints[key], value, f"{where}.{key}")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Types of the parameters, where they can be known."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}


def _plain(declared: Any) -> bool:
    """Whether a type is made of what YAML has, so that a value can be held against it."""
    origin = get_origin(declared)
    if origin in (Union, UnionType):
        return all(_plain(option) for option in get_args(declared))
    if origin is Literal:
        return True
    if origin in CONTAINERS:
        return all(option is ... or _plain(option) for option in get_args(declared))
    return declared in SCALARS or declared in CONTAINERS

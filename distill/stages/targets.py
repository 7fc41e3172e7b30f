"""Configs that name a class (`_target_`): imports the class and checks the options against its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from distill.stages.renamed import moved_option
from distill.typed import parse, unknown_key

SCALARS = (int, float, bool, str, None, NoneType, Any)
CONTAINERS = (list, tuple, dict, Sequence, Mapping)


OPTIONAL = ("bitsandbytes", "torchao")  # packages of optimizers, which nothing else needs


def resolve(config: Any, where: str) -> Callable[..., Any]:
    """Import the class or function that `config` names. Raises ValueError with the place `where`."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}: found {config!r}, expected a mapping with _target_")
    if not isinstance(target := config.get("_target_"), str):
        found = f"found {target!r}" if "_target_" in config else "missing"
        raise ValueError(f"{where}._target_: {found}; expected a class, such as distill.nets.unet.UNet")
    try:
        found = get_object(target)
    except Exception as error:  # importing a user's module may raise any error
        package = target.partition(".")[0]
        if package in OPTIONAL and find_spec(package) is None:
            raise ValueError(
                f"{where}._target_: found {target!r}, but the package {package} is not installed: pip install {package}"
            ) from error
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}._target_: found {target!r}, which cannot be imported: {reason}") from error
    if not callable(found):
        raise ValueError(f"{where}._target_: found {target!r}, expected a class or a function")
    return found


def check_targets(config: Any, where: str) -> None:
    """Check every config with a `_target_` in plain containers, at every depth.

    Raises:
        ValueError: names the option that the constructor does not accept, or whose type is wrong.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_targets(value, f"{where}.{key}")
        if "_target_" in config:
            check_options(resolve(config, where), config, where)
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            check_targets(value, f"{where}[{number}]")


def check_options(target: Callable[..., Any], config: Mapping[str, Any], where: str) -> None:
    """Check the options of one config against the signature of `target`. Raises as `check_targets`."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # compiled code without a signature
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
    """Return the types of the parameters, if they can be resolved."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}


def _plain(declared: Any) -> bool:
    """Return whether a type consists of types that YAML has, so that values can be checked."""
    origin = get_origin(declared)
    if origin in (Union, UnionType):
        return all(_plain(option) for option in get_args(declared))
    if origin is Literal:
        return True
    if origin in CONTAINERS:
        return all(option is ... or _plain(option) for option in get_args(declared))
    return declared in SCALARS or declared in CONTAINERS


def check_method(
    method: Mapping[str, Any], takes: Mapping[str, inspect.Parameter], models: Collection[str]
) -> None:
    """Every option of a method's config is one that its constructor `takes`, and none is missing; `models` are given to it.
    Values are the constructor's business, when the stage starts and the networks are there. Raises ValueError naming the
    option."""
    target = method["_target_"]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    options = {name: takes[name] for name in takes if name not in models}
    given = [name for name in method if name != "_target_"]
    if unknown := [name for name in given if name not in options]:
        if moved := moved_option(unknown[0], options):
            raise ValueError(f"method.{unknown[0]}: is now method.{moved}; write it there")
        raise ValueError(unknown_key("method", unknown[0], options))
    for name, parameter in options.items():
        if parameter.default is parameter.empty and name not in given:
            raise ValueError(f"method.{name}: missing; {target} needs it")

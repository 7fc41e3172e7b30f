"""Nets and processes made from the configs that model files and recipes hold. A config is data: it names a net or a process of
this package, its arguments have the declared types, and it cannot make a build without end."""

from __future__ import annotations

import importlib
import inspect
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, get_type_hints

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from distill.process.base import Process
from distill.typed import check_keys, name_of, parse

Base = TypeVar("Base", nn.Module, Process)
TARGET = "_target_"
PLACES: dict[type, str] = {
    nn.Module: r"distill\.(nets\.\w+|models\.analytic)",
    Process: r"distill\.process\.\w+",
}
WORDS: dict[type, str] = {
    nn.Module: "a net under distill.nets or distill.models.analytic",
    Process: "a process under distill.process",
}
# What constructors of nets and processes raise for arguments that make none.
REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def build_net(config: Any, where: str = "net") -> nn.Module:
    """The net that `config` describes: {_target_: its import path, and the arguments of its constructor}.

    Raises ValueError naming the entry: no net of this package, an unknown, missing or wrong argument."""
    return _build(config, nn.Module, where)


def build_process(config: Any, where: str = "process") -> Process:
    """The noise process that `config` describes; raises like `build_net`."""
    return _build(config, Process, where)  # type: ignore[type-abstract]


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Inside, a module that registers more than `count` parameters in all raises ValueError: a config that asks for millions
    of layers ends at once."""
    seen, thread = 0, threading.get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal seen
        if parameter is None or threading.get_ident() != thread:
            return
        seen += 1
        if seen > count:
            raise ValueError(f"asks for more than the {count} tensors that its weights file holds")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def _build(config: Any, base: type[Base], where: str) -> Base:
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}: found {config!r}, expected a mapping with {TARGET}, {WORDS[base]}")
    cls = _class(config.get(TARGET), base, f"{where}.{TARGET}")
    given = {key: value for key, value in config.items() if key != TARGET}
    hints = get_type_hints(cls.__init__)
    parameters = inspect.signature(cls).parameters
    check_keys(given, parameters, where)
    arguments = {}
    for name, parameter in parameters.items():
        if name in given:
            arguments[name] = _argument(hints[name], given[name], f"{where}.{name}")
        elif parameter.default is parameter.empty:
            raise ValueError(f"{where}.{name}: missing; expected {name_of(hints[name])}")
    try:
        return cls(**arguments)
    except REFUSALS as error:
        raise ValueError(f"{where}: {error}") from error


def _argument(hint: Any, value: Any, where: str) -> Any:
    for base in PLACES:
        if hint is base:
            return value if isinstance(value, base) else _build(value, base, where)
    if hint is Tensor:
        raise ValueError(f"{where}: found a value for a tensor, expected a class whose arguments are plain")
    return parse(hint, value, where)


def _class(target: Any, base: type[Base], where: str) -> type[Base]:
    """The class of this package that `target` names. Nothing outside of the rooms that hold such classes is imported."""
    wrong = ValueError(f"{where}: found {target!r}, expected {WORDS[base]}")
    if not isinstance(target, str) or not re.fullmatch(PLACES[base] + r"\.[A-Za-z]\w*", target):
        raise wrong
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        raise wrong from None
    if not isinstance(found, type) or not issubclass(found, base) or found.__module__ != module:
        raise wrong
    if inspect.isabstract(found) or (base is nn.Module and not _is_net(found)):
        raise wrong
    return found


def _is_net(cls: type) -> bool:
    """Nets are the modules that map states, times and conditions to states."""
    return [*inspect.signature(cls.forward).parameters][2:] == ["t", "cond"]  # type: ignore[attr-defined]

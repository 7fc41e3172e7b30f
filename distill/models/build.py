"""Models, nets and processes made from the configs that model files and recipes hold. A config is data: it names classes of
this package, its arguments have the declared types, and it cannot make a build without end."""

from __future__ import annotations

import importlib
import inspect
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, get_args, get_type_hints

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from distill.models.conditions import Conditions
from distill.models.decoder import Decoder
from distill.models.model import Model
from distill.nets.autoencoder import AutoencoderNet
from distill.nets.tokenizer import TokenizerNet
from distill.process.base import Process
from distill.typed import check_keys, join, name_of, parse

Base = TypeVar("Base", bound=object)
TARGET = "_target_"
# What a config may name: base class -> (where its classes are, how messages call them).
PLACES: dict[type, tuple[str, str]] = {
    Model: (r"distill\.models\.(denoiser|tokens|involved|code_flow)", "a model under distill.models"),
    AutoencoderNet: (
        r"distill\.(nets|models\.families)\.\w+",
        "an autoencoder under distill.nets or distill.models.families",
    ),
    TokenizerNet: (
        r"distill\.(nets|models\.families)\.\w+",
        "a tokenizer under distill.nets or distill.models.families",
    ),
    nn.Module: (
        r"distill\.(nets\.\w+|models\.(analytic|adapters|families\.\w+))",
        "a net under distill.nets, distill.models.analytic, distill.models.adapters or distill.models.families",
    ),
    Process: (r"distill\.process\.\w+", "a process under distill.process"),
    Conditions: (
        r"distill\.models\.(conditions|prompts)",
        "conditions of distill.models.conditions or distill.models.prompts",
    ),
    Decoder: (r"distill\.models\.decoder", "a decoder under distill.models.decoder"),
}
# What constructors raise for arguments that make nothing.
REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def build_model(config: Any, where: str = "model") -> Model:
    """The model of `Model.config()`, with fresh weights; every argument must be there.

    Raises ValueError naming the entry behind `where`."""
    return _build(config, Model, where)  # type: ignore[type-abstract]


def fresh_as(config: Any, where: str = "model", **parts: Any) -> Model:
    """The model of a class and its options, {_target_: ..., option: ...}, whose further arguments are `parts`.

    Raises like `build_model`."""
    target = _class(config.get(TARGET), Model, join(where, TARGET))  # type: ignore[type-abstract]
    given = {key: value for key, value in config.items() if key != TARGET}
    hints = get_type_hints(target.__init__)
    check_keys(given, [name for name in hints if name not in (*parts, "return")], where)
    options = {name: _argument(hints[name], value, join(where, name)) for name, value in given.items()}
    return target(**parts, **options)


def build_net(config: Any, where: str = "net") -> nn.Module:
    """The net that `config` describes: {_target_: its import path, and the arguments of its constructor}.

    Raises ValueError naming the entry: no net of this package, an unknown, missing or wrong argument."""
    return _build(config, nn.Module, where)


def build_process(config: Any, where: str = "process") -> Process:
    """The noise process that `config` describes; raises like `build_net`."""
    return _build(config, Process, where)  # type: ignore[type-abstract]


def build_decoder(config: Any, where: str = "decoder") -> Decoder:
    """The decoder that `config` describes, with fresh weights; raises like `build_net`."""
    return _build(config, Decoder, where)


def build_conditions(config: Any, where: str = "conditions") -> Conditions:
    """The conditions that `config` describes; raises like `build_net`."""
    return _build(config, Conditions, where)  # type: ignore[type-abstract]


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Inside, a module that registers more than `count` parameters in all raises ValueError: so a config with millions
    of layers fails at once."""
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
        raise ValueError(
            f"{where.removesuffix(': ')}: found {config!r}, expected a mapping with {TARGET}, {PLACES[base][1]}"
        )
    cls = _class(config.get(TARGET), base, join(where, TARGET))
    given = {key: value for key, value in config.items() if key != TARGET}
    hints = get_type_hints(cls.__init__)
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    parameters = [] if cls.__init__ is object.__init__ else parameters
    check_keys(given, [parameter.name for parameter in parameters], where)
    arguments = {}
    for parameter in parameters:
        name = parameter.name
        if name in given:
            arguments[name] = _argument(hints[name], given[name], join(where, name))
        elif parameter.default is parameter.empty or base is Model:
            raise ValueError(f"{join(where, name)}: missing; expected {name_of(hints[name])}")
    try:
        return cls(**arguments)
    except REFUSALS as error:
        raise ValueError(f"{where}{'' if where.endswith(': ') else ': '}{error}") from error


def _argument(hint: Any, value: Any, where: str) -> Any:
    base = next((option for option in get_args(hint) or (hint,) if option in PLACES), None)
    if base is not None:
        return value if isinstance(value, base) else _build(value, base, where)
    if hint is Tensor:
        raise ValueError(f"{where}: found a value for a tensor, expected a class whose arguments are plain")
    return parse(hint, value, where)


def _class(target: Any, base: type[Base], where: str) -> type[Base]:
    """The class of this package that `target` names. Nothing outside of the rooms that hold such classes is imported."""
    place, words = PLACES[base]
    wrong = ValueError(f"{where}: found {target!r}, expected {words}")
    if not isinstance(target, str) or not re.fullmatch(place + r"\.[A-Za-z]\w*", target):
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
    return [*inspect.signature(cls.forward).parameters][2:4] == ["t", "cond"]  # type: ignore[attr-defined]

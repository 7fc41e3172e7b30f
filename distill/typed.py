"""Parses plain containers (YAML, JSON) into declared types. Unknown keys, missing entries and wrong types raise.

A schema is any of: a dataclass, `X | None`, `Literal[...]`, `list[T]`, `tuple[T, ...]`, `tuple[A, B]`, `dict[K, T]`,
int, float (accepts an int, not nan or infinities), str, bool, None, `Any`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

Schema = TypeVar("Schema")


def parse(schema: type[Schema], value: Any, where: str = "") -> Schema:
    """Convert `value` to an instance of `schema`.

    Args:
        schema: the declared type.
        value: plain containers; mappings become dataclasses, lists become the declared sequences.
        where: place of `value`, the start of every message: "stages.evaluate", "runs/x/model.json: sampler".

    Raises:
        ValueError: names the place, what was found and what is expected.
    """
    return _read(schema, value, where)


def filled(default: Schema, given: Schema | Mapping[str, Any], where: str) -> Schema:
    """A dataclass instance from its constructor's argument: an instance as it is, a mapping over the fields of `default`.

    Raises like `parse`."""
    if isinstance(given, Mapping):
        given = {**vars(default), **given}
    return parse(type(default), given, where)


def settle(instance: Any, where: str = "") -> None:
    """Convert every field of a dataclass instance in place to its declared type. Raises as `parse`.

    For `__post_init__`, if the constructor is called with plain containers."""
    for field, declared in _fields(instance.__class__).values():
        if not field.name.startswith("_"):
            value = _read(declared, getattr(instance, field.name), join(where, field.name))
            object.__setattr__(instance, field.name, value)


# Options of other tools that a user may look for. Without these words the nearest key would be suggested in their place.
NOT_IMPLEMENTED = {
    **dict.fromkeys(
        (
            "guidance_rescale",
            "cfg_rescale",
            "rescale_cfg",
            "true_cfg_scale",
            "cfg_zero_star",
            "guidance_interval",
        ),
        "not implemented: guidance is u + g (c - u) at all times, without rescaling",
    ),
    **dict.fromkeys(
        ("pag_scale", "sag_scale", "perturbed_attention"),
        "not implemented: guidance is u + g (c - u), with the null condition as u",
    ),
}


def unknown_key(where: str, key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown key, with the most similar known key and the list of all."""
    names = [str(name) for name in known]
    if (why := NOT_IMPLEMENTED.get(str(key))) is not None:
        return f"{join(where, key)}: no such key, {why}; expected {', '.join(names) or 'none'}"
    near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    hint = f", did you mean {join(where.rpartition(': ')[2], near[0])}?" if near else ""
    return f"{join(where, key)}: no such key{hint}; expected {', '.join(names) or 'none'}"


def within(where: str, error: object, separator: str = ".") -> str:
    """Return the message of an error with the place `where` before it, and before the key that it suggests."""
    place = where.rpartition(": ")[2]
    message = re.sub(
        r"(no such key, did you mean )(?!stages\.)(\w[\w.]*)\?",  # a suggested value stays unchanged
        lambda m: f"{m[1]}{join(place, m[2])}?",
        str(error),
    )
    return f"{where}{separator}{message}"


def check_keys(value: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first key of `value` that is not `known`."""
    names = list(known)
    for key in value:
        if key not in names:
            raise ValueError(unknown_key(where, str(key), names))


def name_of(schema: Any) -> str:
    """Return a readable name of a type, for messages."""
    origin, args = get_origin(schema), get_args(schema)
    if schema is Any:
        return "anything"
    if schema in (None, NoneType):
        return "null"
    if origin in (Union, UnionType):
        return " or ".join(name_of(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in args)
    if origin is tuple:
        return f"a list of {name_of(args[0])}" if args[-1] is ... else _pair(args)
    if origin in (list, Sequence):
        return f"a list of {name_of(args[0])}"
    if origin in (dict, Mapping) or schema in (dict, Mapping) or is_dataclass(schema):
        return "a mapping"
    return "a list" if schema in (list, tuple) else str(getattr(schema, "__name__", schema))


def _pair(args: Sequence[Any]) -> str:
    return "[" + ", ".join(name_of(option) for option in args) + "]"


def join(where: str, key: Any) -> str:
    """The place of an entry of `where`."""
    return f"{where}.{key}" if where and not where.endswith((": ", ".")) else f"{where}{key}"


@cache
def _fields(schema: Any) -> dict[str, tuple[Field[Any], Any]]:
    """Return name -> (field, its type) of a dataclass."""
    hints = get_type_hints(schema)
    return {f.name: (f, hints[f.name]) for f in fields(schema) if get_origin(hints[f.name]) is not ClassVar}


def _read(schema: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(schema), get_args(schema)
    if schema is Any:
        return value
    if origin in (Union, UnionType):
        return _read_union(args, value, where)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in args):
            return value
        raise _wrong(schema, value, where)
    if is_dataclass(schema) and isinstance(schema, type):
        return value if isinstance(value, schema) else _read_dataclass(schema, value, where)
    kind = origin or schema
    if kind in (dict, Mapping):
        return _read_mapping(schema, args, value, where)
    if kind in (list, tuple, Sequence):
        return _read_sequence(schema, kind, args, value, where)
    if schema is None or schema is NoneType:
        if value is not None:
            raise _wrong(schema, value, where)
        return None
    return _read_scalar(schema, value, where)


def _read_scalar(schema: Any, value: Any, where: str) -> Any:
    accepted = (int, float) if schema is float else schema
    if not isinstance(value, accepted) or (isinstance(value, bool) and schema is not bool):
        raise _wrong(schema, value, where)
    if schema is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: found {value!r}, expected a finite number")
    return value


def _read_union(options: Sequence[Any], value: Any, where: str) -> Any:
    """Convert to the first option that accepts the value; the error is that of the last option of the value's kind."""
    if value is None and NoneType in options:
        return None
    options = [option for option in options if option is not NoneType]
    if len(options) == 1:
        try:
            return _read(options[0], value, where)
        except ValueError as error:
            raise ValueError(
                str(error).replace(
                    f"expected {name_of(options[0])}", f"expected {name_of(options[0])} or null", 1
                )
            ) from None
    matching = [option for option in options if _same_kind(option, value)]
    for option in matching:
        try:
            return _read(option, value, where)
        except ValueError:
            if option is matching[-1]:
                raise
    raise ValueError(
        f"{where}: found {value!r}, expected {' or '.join(name_of(option) for option in options)}"
    )


def _same_kind(option: Any, value: Any) -> bool:
    kind = get_origin(option) or option
    if is_dataclass(option) or kind in (dict, Mapping):
        return isinstance(value, Mapping) or (isinstance(option, type) and isinstance(value, option))
    if kind in (list, tuple, Sequence):
        return isinstance(value, list | tuple)
    if kind is Literal:
        return any(type(value) is type(choice) for choice in get_args(option))
    return isinstance(value, (int, float) if kind is float else kind) and (
        not isinstance(value, bool) or kind is bool
    )


def _read_mapping(schema: Any, args: Sequence[Any], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(schema, value, where)
    key_type, value_type = args or (Any, Any)
    result = {}
    for key, entry in value.items():
        if key_type is not Any and (not isinstance(key, key_type) or isinstance(key, bool)):
            raise ValueError(f"{where}: found the key {key!r}, expected {name_of(key_type)}")
        result[key] = _read(value_type, entry, join(where, key))
    return result


def _read_sequence(schema: Any, kind: Any, args: Sequence[Any], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(schema, value, where)
    make = tuple if kind is tuple else list
    if not args:
        return make(value)
    if kind is tuple and args[-1] is not ...:
        if len(value) != len(args):
            raise _wrong(schema, list(value), where)
        return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    return make(_read(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))


def _read_dataclass(schema: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(schema, value, where)
    known = {
        name: pair for name, pair in _fields(schema).items() if pair[0].init and not name.startswith("_")
    }
    check_keys(value, known, where)
    given = {}
    for name, (field, declared) in known.items():
        if name in value:
            given[name] = _read(declared, value[name], join(where, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{join(where, name)}: missing; expected {name_of(declared)}")
    try:
        return schema(**given)
    except (ValueError, TypeError) as error:
        # `__post_init__` names a field: put the place of the dataclass before it.
        first = re.split(r"\W", str(error), maxsplit=1)[0]
        separator = ": " if first not in known else "." if where and not where.endswith((": ", ".")) else ""
        raise ValueError(within(where, error, separator)) from error


def _wrong(schema: Any, value: Any, where: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return ValueError(f"{where.removesuffix(': ')}: found {shown}, expected {name_of(schema)}")


class Configured:
    """Objects that keep the arguments of their constructor: `models.build` makes an equal one from `config()`."""

    _config: dict[str, Any]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        made = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        given = signature.bind_partial(made, *args, **options).arguments if args or options else {}
        plain = {name: _plain(value) for name, value in given.items() if name != "self"}
        made.__dict__["_config"] = {"_target_": f"{cls.__module__}.{cls.__qualname__}", **plain}
        return made

    def config(self) -> dict[str, Any]:
        """`{"_target_": import path, **arguments}` in plain containers."""
        return copy.deepcopy(self._config)


def _plain(value: Any) -> Any:
    if callable(config := getattr(value, "config", None)):
        return config()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if callable(listed := getattr(value, "tolist", None)):  # tensors and arrays
        return listed()
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value

"""What a verb says to a terminal: one message for an error, no control character that a name brings along, nothing that a
terminal's encoding or a closed pipe could break."""

from __future__ import annotations

import io
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from distill.typed import unknown_key

Options = TypeVar("Options")
EXPECTED = (ValueError, OSError, RuntimeError, ImportError, FloatingPointError)
CLOSED = 128 + 13  # the exit code of a program that SIGPIPE ends
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate; line and paragraph separators


def printable(text: object) -> str:
    """`text` with control characters, all but line feeds, written as escapes: none reaches the terminal."""
    return "".join(
        letter
        if letter == "\n" or unicodedata.category(letter) not in UNSEEN
        else letter.encode("unicode_escape", "backslashreplace").decode()
        for letter in str(text)
    )


def line(text: object) -> str:
    """`text` as one line: `printable`, and a line feed written as an escape too."""
    return printable(text).replace("\n", "\\n")


def full_errors() -> bool:
    """Whether DISTILL_TRACEBACK=1 asks for tracebacks."""
    return os.environ.get("DISTILL_TRACEBACK", "0") == "1"


def is_main() -> bool:
    """Whether this process talks (of several, the one of rank 0)."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def told(explain: Callable[[Exception], str | None] = lambda _: None) -> Iterator[None]:
    """An error inside the block ends the program with one message; DISTILL_TRACEBACK=1 shows where it came from.

    explain: the message of an error that it knows, None for others. Standard output takes every character, as an escape
    where its encoding has none, and may be closed at any time."""
    _prepare()
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if full_errors():
            raise
        _drop_output()
        sys.exit(CLOSED)
    except Exception as error:
        if full_errors():
            raise
        message = explain(error)
        if message is None:
            message = str(error)
            if not isinstance(error, EXPECTED) or not message:
                message = f"{type(error).__name__}: {message} (unexpected; DISTILL_TRACEBACK=1 shows where)"
        _flush()
        sys.exit(f"error: {printable(message)}")


def read_options(schema: type[Options], given: Sequence[str]) -> Options:
    """`key=value` arguments as a dataclass; of a key that is given twice, the last counts.

    Strings are taken as typed; `null` is None where the field may be None; numbers are decimal. Raises ValueError naming
    the key."""
    hints = get_type_hints(schema)
    names = [field.name for field in fields(schema) if field.init]  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for argument in given:
        key, equals, value = argument.partition("=")
        if not equals or key not in names:
            known = unknown_key("", key, names).partition(": ")[2]
            near = re.search(r"did you mean (\w+)\?", known)
            hint = f"; did you mean {near[1]}=?" if near else ""
            raise ValueError(f"{argument}: expected key=value with a key among {', '.join(names)}{hint}")
        found[key] = _read(hints[key], check_utf8(value, key), key)
    return schema(**found)


def check_utf8(text: str, where: str) -> str:
    """`text`, which the shell gave; raises ValueError where its bytes are no UTF-8 (reports and JSON could not hold it)."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{where}: found {printable(text)}, which is not UTF-8; rename the file or folder")
    return text


def _read(declared: Any, text: str, key: str) -> Any:
    options = get_args(declared) if get_origin(declared) is UnionType else (declared,)
    if text == "null" and NoneType in options:
        return None
    if str in options:
        return text
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in options and re.fullmatch(r"[+-]?[0-9]{1,19}", text):
        return int(text)
    if float in options and re.fullmatch(
        r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?", text, re.IGNORECASE
    ):
        return float(text)
    expected = " or ".join("null" if option is NoneType else option.__name__ for option in options)
    raise ValueError(f"{key}: found {text!r}, expected {expected}")


def _prepare() -> None:
    """Streams that take every text; a stream that the caller closed is the null device."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):  # it flushes first, and nobody may be reading
                stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """What is still buffered for standard output goes nowhere, so that the interpreter ends in silence."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # a stream without a descriptor
        pass
    finally:
        os.close(null)

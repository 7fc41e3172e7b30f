"""Terminal input and output: one message per error, escaped control characters, closed pipes, `key=value` arguments."""

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
CLOSED = 128 + 13  # exit status of a process killed by SIGPIPE
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate; line and paragraph separators


def printable(text: object) -> str:
    """Return `text` with all control characters but line feeds escaped."""
    return "".join(
        letter
        if letter == "\n" or unicodedata.category(letter) not in UNSEEN
        else letter.encode("unicode_escape", "backslashreplace").decode()
        for letter in str(text)
    )


def line(text: object) -> str:
    """Return `text` with all control characters and line feeds escaped."""
    return printable(text).replace("\n", "\\n")


def full_errors() -> bool:
    """Return whether DISTILL_TRACEBACK=1 is set."""
    return os.environ.get("DISTILL_TRACEBACK", "0") == "1"


def is_main() -> bool:
    """Return whether this is the main process (rank 0)."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def report_errors(explain: Callable[[Exception], str | None] = lambda _: None) -> Iterator[None]:
    """Exit with one message on an error inside the block; DISTILL_TRACEBACK=1 shows the traceback.

    Characters that standard output cannot encode are escaped. If standard output is closed, exits with status `CLOSED`.

    Args:
        explain: returns the message for an error, or None to use the error's own text.
    """
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


def asked_for_help(*pages: str | None) -> bool:
    """Print `pages` if the command line has -h or --help; returns whether it has."""
    if asked := bool({"-h", "--help"} & set(sys.argv[1:])):
        print("\n\n".join(filter(None, pages)))
    return asked


def read_options(schema: type[Options], given: Sequence[str]) -> Options:
    """Parse `key=value` arguments into a dataclass. If a key is given twice, the last value is used.

    Strings are taken literally; `null` is None if the field may be None; numbers are decimal. Raises ValueError naming the
    key."""
    hints = get_type_hints(schema)
    names = [field.name for field in fields(schema) if field.init]  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for argument in given:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument}: expected key=value with a key among {', '.join(names)}")
        if key not in names:
            raise ValueError(unknown_key("", key, names))
        found[key] = _read(hints[key], check_utf8(value, key), key)
    return schema(**found)


def split_arguments(arguments: Sequence[str], schema: type[Any]) -> tuple[list[str], list[str]]:
    """(paths, `key=value` arguments for `read_options`): a path may have an equals sign, where there is such a file."""
    keys = [field.name for field in fields(schema) if field.init]

    def is_option(argument: str) -> bool:
        key, equals, _ = argument.partition("=")
        known = bool(equals) and (key in keys or not os.path.exists(argument))
        return known or argument.startswith("-")

    named = [argument for argument in arguments if is_option(argument)]
    return [argument for argument in arguments if not is_option(argument)], named


def check_utf8(text: str, where: str) -> str:
    """Return `text`; raise ValueError if it is not valid UTF-8, which reports and JSON need."""
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
    """Make standard output and error escape characters that they cannot encode; closed streams become the null device."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):  # it flushes first, which fails for a closed pipe
                stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Discard buffered output, so that the interpreter exits without an error message."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # a stream without a descriptor
        pass
    finally:
        os.close(null)

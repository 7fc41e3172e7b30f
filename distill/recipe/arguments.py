"""Converts command-line arguments for Hydra: quotes names and paths, so that Hydra reads them literally."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from distill.files import sha256_text
from distill.terminal import check_utf8

# Top-level keys whose values are names or paths. The value of `path` is a path at every depth.
NAMES = ("name", "recipe")
PATHS = ("runs_dir", "model", "reference", "out")
MULTIRUN = ("-m", "--multirun")
# Hydra's flags that take a value in the next argument.
TAKES_VALUE = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"),
    *("--experimental-rerun", "--cfg", "-c", "--info", "-i"),
)
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
# Overrides that change no result. They enter the name of a run only if the sweep varies them.
NOT_IN_NAMES = ("recipe", "profile", "runs_dir", "name", "plan", "redo", "trainer", "loggers", "callbacks")
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=(?:[A-Za-z0-9_.]+|[0-9][0-9.]*e-[0-9]+)")
LONGEST_SLUG = 120


def arguments(given: Sequence[str]) -> list[str]:
    """Convert command-line arguments for Hydra.

    Moves overrides before flags, quotes names and paths, writes `steps=1,2` as a list and expands `~` at the start of a
    path. Quoted values and the value lists of a sweep (`-m`) keep Hydra's meaning.

    Raises:
        ValueError: if an argument is not UTF-8, or is neither a flag nor `key=value`.
    """
    overrides: list[str] = []
    flags: list[str] = []
    sweep = bool(set(MULTIRUN) & set(given))
    for number, argument in enumerate(given):
        check_utf8(argument, "arguments")
        before = given[number - 1] if number else ""
        if before in TAKES_VALUE:
            flags.append(os.path.expanduser(argument) if before in ("--config-dir", "-cd") else argument)
        elif argument.startswith("--config-dir="):
            flags.append(f"--config-dir={os.path.expanduser(argument.partition('=')[2])}")
        elif argument.startswith("-"):
            flags.append(argument)
        elif "=" not in argument and not argument.startswith("~"):
            raise ValueError(f"{argument}: expected key=value, as in recipe={argument}")
        else:
            overrides.append(_override(argument, sweep))
    return [*overrides, *flags]


def _override(argument: str, sweep: bool) -> str:
    key, _, value = argument.partition("=")
    if key == "steps" and not sweep and re.fullmatch(r"\d+(,\d+)+", value):
        return f"{key}=[{value}]"
    if not is_name_or_path(key) or value == "null" or QUOTED.fullmatch(value):
        return argument
    if sweep and is_sweep(argument):
        if re.search(r"[\[\](){}'\"]", value):
            return argument
        return f"{key}={','.join(_literal(key, one.strip()) for one in value.split(','))}"
    return f"{key}={_literal(key, value)}"


def check_choice(argument: str, groups: Path) -> None:
    """Raise ValueError if an override sets a config group (a folder of `groups`) to a config instead of option names."""
    key, _, value = argument.partition("=")
    group = key.lstrip("+").partition("@")[0]
    folder = groups / group
    if not value.lstrip().startswith(("[", "{")) or not group.isidentifier() or not folder.is_dir():
        return
    try:
        given = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return  # Hydra reports it later
    if isinstance(given, list) and all(isinstance(one, str | QuotedString) for one in given):
        return
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    keys = f"; to change single keys, type {group}.KEY=VALUE" if isinstance(given, dict) else ""
    raise ValueError(
        f"{group}: found {value}, expected option names among {names}{keys}; to add an option, write "
        f"FOLDER/{group}/NAME.yaml and pass --config-dir FOLDER"
    )


def _literal(key: str, value: str) -> str:
    return quoted(value if key.lstrip("+") in NAMES else os.path.expanduser(value))


def is_name_or_path(key: str) -> bool:
    """Return whether the value of `key` is a name or a path."""
    key = key.lstrip("+")
    return key in (*NAMES, *PATHS) or key == "path" or key.endswith(".path")


def quoted(value: str) -> str:
    """Quote `value` so that Hydra reads it literally: not as a number, a list or an interpolation."""
    value = re.sub(r"(\\*)\$\{", lambda m: f"{m[1]}{m[1]}\\${{", value)
    value = re.sub(r"(\\*)'", lambda m: f"{m[1]}{m[1]}\\'", value)
    value = re.sub(r"(\\+)\Z", lambda m: m[1] * 2, value)
    return f"'{value}'"


def is_sweep(argument: str) -> bool:
    """Return whether Hydra reads an override as a sweep over several values."""
    try:
        return bool(OverridesParser.create().parse_override(argument).is_sweep_override())
    except HydraException:
        return False


def to_argument(override: str) -> str:
    """Convert an override of a job, as Hydra renders it, to an argument for another process."""
    parsed: Override = OverridesParser.create().parse_override(override)
    value = parsed.value()
    if isinstance(value, str) and is_name_or_path(override.partition("=")[0]):
        return f"{override.partition('=')[0]}={quoted(value)}" if "${" not in value else override
    return override


def swept(given: Sequence[str]) -> set[str]:
    """Return the keys to which a command line gives several values."""
    return {
        o.partition("=")[0].lstrip("+") for o in given if "=" in o and not o.startswith("-") and is_sweep(o)
    }


def slug(overrides: Sequence[str], over: set[str], named: bool) -> str:
    """Return the suffix that a run of a sweep adds to its name: its overrides, unique for each set of overrides.

    A digest is appended if the overrides contain characters that are not allowed in the name, or are too long.

    Args:
        overrides: of this run.
        over: keys that the sweep varies.
        named: whether the run has a `name`; if not, its name already contains recipe and profile.
    """
    kept = sorted(o for o in overrides if _in_name(o.partition("=")[0].lstrip("+"), over, named))
    text = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", o.lstrip("+~")).strip("-") for o in kept)
    if len(text) <= LONGEST_SLUG and all(PLAIN.fullmatch(o) for o in kept):
        return text
    return f"{text[: LONGEST_SLUG - 20]}-{sha256_text(chr(0).join(kept))[:12]}"


def _in_name(key: str, over: set[str], named: bool) -> bool:
    first = re.split(r"[.@]", key)[0]
    if first not in NOT_IN_NAMES:
        return True
    return key in over and first not in ("runs_dir", "name", *(() if named else ("recipe", "profile")))

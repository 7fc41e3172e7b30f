"""Command lines as people type them: names and paths are taken letter for letter, before Hydra's grammar sees them."""

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

# Keys at the top whose values are names or paths; `path` is one at every depth.
NAMES = ("name", "recipe")
PATHS = ("runs_dir", "model", "reference", "out")
MULTIRUN = ("-m", "--multirun")
# Hydra's flags that take a value in the next argument.
TAKES_VALUE = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"),
    *("--experimental-rerun", "--cfg", "-c", "--info", "-i"),
)
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
# Overrides of a sweep that change no result: no part of a run's name unless the sweep goes over them.
NOT_IN_NAMES = ("recipe", "profile", "runs_dir", "name", "plan", "redo", "trainer", "loggers")
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=(?:[A-Za-z0-9_.]+|[0-9][0-9.]*e-[0-9]+)")
LONGEST_SLUG = 120


def arguments(given: Sequence[str]) -> list[str]:
    """Command-line arguments as Hydra reads them: overrides first, so that flags may stand anywhere; values of names and
    paths quoted; step counts as a list; `~` at the start of a path expanded.

    A value that stands in quotes already, and the values that a sweep (`-m`) goes over, keep Hydra's meaning. Raises
    ValueError for an argument that is not UTF-8."""
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
        return f"{key}={','.join(_letters(key, one.strip()) for one in value.split(','))}"
    return f"{key}={_letters(key, value)}"


def check_choice(argument: str, groups: Path) -> None:
    """Raise ValueError where an override gives a group (a folder of `groups`) a config in place of names of its options."""
    key, _, value = argument.partition("=")
    group = key.lstrip("+").partition("@")[0]
    folder = groups / group
    if not value.lstrip().startswith(("[", "{")) or not group.isidentifier() or not folder.is_dir():
        return
    try:
        given = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return  # told when Hydra reads it
    if isinstance(given, list) and all(isinstance(one, str | QuotedString) for one in given):
        return
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    keys = f"; its keys are given one by one, {group}.KEY=VALUE" if isinstance(given, dict) else ""
    raise ValueError(
        f"{group}: found {value}, expected names of options among {names}{keys}; an option of your own is a file "
        f"FOLDER/{group}/NAME.yaml, with --config-dir FOLDER"
    )


def _letters(key: str, value: str) -> str:
    return quoted(value if key.lstrip("+") in NAMES else os.path.expanduser(value))


def is_name_or_path(key: str) -> bool:
    """Whether the value of a key is a name or a path."""
    key = key.lstrip("+")
    return key in (*NAMES, *PATHS) or key == "path" or key.endswith(".path")


def quoted(value: str) -> str:
    """A string in Hydra's grammar that means `value` letter for letter: no number, no list, no interpolation."""
    value = re.sub(r"(\\*)\$\{", lambda m: f"{m[1]}{m[1]}\\${{", value)
    value = re.sub(r"(\\*)'", lambda m: f"{m[1]}{m[1]}\\'", value)
    value = re.sub(r"(\\+)\Z", lambda m: m[1] * 2, value)
    return f"'{value}'"


def is_sweep(argument: str) -> bool:
    """Whether Hydra reads an override as several values to go over."""
    try:
        return bool(OverridesParser.create().parse_override(argument).is_sweep_override())
    except HydraException:
        return False


def typed_again(override: str) -> str:
    """An override of a job, as Hydra renders it, for the command line of another process."""
    parsed: Override = OverridesParser.create().parse_override(override)
    value = parsed.value()
    if isinstance(value, str) and is_name_or_path(override.partition("=")[0]):
        return f"{override.partition('=')[0]}={quoted(value)}" if "${" not in value else override
    return override


def swept(given: Sequence[str]) -> set[str]:
    """Keys that a command line gives several values for."""
    return {
        o.partition("=")[0].lstrip("+") for o in given if "=" in o and not o.startswith("-") and is_sweep(o)
    }


def slug(overrides: Sequence[str], over: set[str], named: bool) -> str:
    """What a run of a sweep adds to its name: its overrides, readable, and different for different ones.

    over: keys that the sweep goes over; named: whether the run was given a name (else recipe and profile stand in it).
    Overrides that lose letters in a file name add a digest of what they were."""
    told = sorted(o for o in overrides if _tells(o.partition("=")[0].lstrip("+"), over, named))
    text = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", o.lstrip("+~")).strip("-") for o in told)
    if len(text) <= LONGEST_SLUG and all(PLAIN.fullmatch(o) for o in told):
        return text
    return f"{text[: LONGEST_SLUG - 20]}-{sha256_text(chr(0).join(told))[:12]}"


def _tells(key: str, over: set[str], named: bool) -> bool:
    first = re.split(r"[.@]", key)[0]
    if first not in NOT_IN_NAMES:
        return True
    return key in over and first not in ("runs_dir", "name", *(() if named else ("recipe", "profile")))

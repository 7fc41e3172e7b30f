"""Checks of names that become path components: of runs, stages, rows, and files named in other files."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path

LONGEST = 200  # bytes; file systems allow 255, of which temporary names and suffixes need some


def check_name(name: object, where: str, *, reserved: Collection[str] = ()) -> str:
    """Return `name` if it is a valid path component.

    It must be a string without `/`, backslash, control characters, a leading dot or spaces at its ends, of at most 200 bytes
    of UTF-8, and not in `reserved`.

    Args:
        name: to check.
        where: place of the name, the start of the message.
        reserved: names that the run uses.

    Raises:
        ValueError: names the place and the name.
    """
    expected = "expected a name: one component of a path, without a leading dot"
    if not isinstance(name, str) or not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"{where}: found {name!r}, {expected}")
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        raise ValueError(f"{where}: found {name!r}, {expected} or control characters")
    if name != name.strip():
        raise ValueError(f"{where}: found {name!r}, {expected} or spaces at its ends")
    if len(name.encode()) > LONGEST:
        raise ValueError(f"{where}: found a name of {len(name.encode())} bytes, expected at most {LONGEST}")
    if name in reserved:
        raise ValueError(f"{where}: found {name!r}, which the run itself uses; expected another name")
    return name


def inside(folder: Path, name: object, where: str) -> Path:
    """Return `folder / name` for a name read from a file. Raises ValueError unless it is one component."""
    return folder / check_name(name, where)

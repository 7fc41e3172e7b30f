"""Names that become paths: one check for runs, stages, rows and files that data files name."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path

LONGEST = 200  # bytes; file systems allow 255, and temporary names and suffixes need some


def check_name(name: object, where: str, *, reserved: Collection[str] = ()) -> str:
    """`name`, if it is one component of a path that hides nothing: a string without `/`, control characters or a leading
    dot, of at most 200 bytes of UTF-8, and none of `reserved`.

    where: what the name is of, which starts the message. Raises ValueError."""
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
    """The file `name` of `folder`, as a data file in it calls it: one component, so that it lies in that folder."""
    return folder / check_name(name, where)

"""When two data sets mean the same by a class."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes in one spelling: numbers without leading zeros, letters with their accents composed (file systems
    differ in that). Nothing is translated: "three" is not "3"."""
    if all(name.isdecimal() for name in names):
        return tuple(str(int(name)) for name in names)
    return tuple(unicodedata.normalize("NFC", name) for name in names)

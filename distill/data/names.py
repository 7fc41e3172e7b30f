"""Normalises class names, to compare the classes of two data sets."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Normalise class names: numbers lose leading zeros, letters are composed with their accents (Unicode NFC)."""
    if all(name.isdecimal() for name in names):
        return tuple(str(int(name)) for name in names)
    return tuple(unicodedata.normalize("NFC", name) for name in names)

"""Entries of a log: one JSON object a line, written strictly and read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill.typed import parse


def lines_of(entries: Iterable[Mapping[str, float | None]]) -> str:
    """Entries as one JSON object a line; null for what is not finite."""
    finite = [
        {name: v if v is not None and math.isfinite(v) else None for name, v in entry.items()}
        for entry in entries
    ]
    return "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in finite)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of one JSON object a line, each with a whole number "step" and beside it numbers or null; none
    where there is no file. A last line that a kill cut off is dropped.

    Raises ValueError naming the file and the line of anything else."""
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file, expected one JSON object a line")
    *lines, last = path.read_bytes().split(b"\n")
    entries = [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    try:
        return [*entries, _entry(last, f"{path}, line {len(lines) + 1}")]
    except ValueError:  # empty, or cut off: nothing that was written whole ends without a newline
        return entries


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    entry = parse(dict[str, float | None], found, where)
    step = entry.get("step")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{where}: step: found {step!r}, expected a whole number of at least 0")
    return entry


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"found {text}, expected a finite number or null")

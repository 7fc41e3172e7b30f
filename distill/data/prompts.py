"""Prompts in a file: one a line, or JSON lines."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

LARGEST = 2**20  # characters of one line
JSON_LINES = (".jsonl", ".ndjson")
OTHERS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".yaml", ".yml", ".gz", ".zip", ".tar")


class Prompts:
    """Prompts of a text file in UTF-8, one a line, or of JSON lines (`*.jsonl`) with the prompt under `key`.

    Empty lines are skipped; lines end with \\n, \\r\\n or \\r. They are no `Source` until a stage has encoded them, which the
    expansion of a recipe inserts.

    Args:
        path: the file. key: entry of JSON lines. limit: use the first so many; None: all.

    Raises:
        ValueError, FileNotFoundError: name the argument, the file and the line: no file, of another format, not UTF-8, no
            JSON, no prompt in it, more than `LARGEST` characters, a character that no text has.
    """

    def __init__(self, path: str, key: str = "prompt", limit: int | None = None) -> None:
        for name, value in (("path", path), ("key", key)):
            if not isinstance(value, str):
                raise ValueError(f"{name}: found {value!r}, expected a string; put it in quotes")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"limit: found {limit!r}, expected an integer of at least 1, or null")
        file, where = Path(path).expanduser(), f"path: {path}"
        if not file.is_file():
            raise FileNotFoundError(f"{where}: no such file; expected prompts, one a line, or JSON lines")
        suffix = file.suffix.lower()
        if suffix in OTHERS:
            raise ValueError(
                f"{where}: found a {suffix} file, expected text with one prompt a line (*.txt), or JSON lines "
                f'(*.jsonl) such as {{"{key}": "a dog"}}'
            )
        lines = re.split(r"\r\n|\r|\n", _decoded(file.read_bytes(), where))
        found = [
            _checked(line.strip(), key if suffix in JSON_LINES else None, f"{where}: line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        if not found:
            raise ValueError(f"{where}: holds no prompts; expected one a line")
        self.prompts = found[:limit]

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """sha256 of the prompts."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = len(re.findall(rb"\r\n|\r|\n", content[: error.start])) + 1
        raise ValueError(
            f"{where}: line {number}: is not UTF-8: byte {error.start}; save it as UTF-8"
        ) from error


def _checked(line: str, key: str | None, where: str) -> str:
    """The prompt in a line; `key`: of JSON lines."""
    if len(line) > LARGEST:
        raise ValueError(f"{where}: has {len(line)} characters, expected at most {LARGEST}")
    prompt = line if key is None else _of_json(line, key, where)
    for character, what in (("\0", "a NUL character"), (r"[\ud800-\udfff]", "half of a surrogate pair")):
        if found := re.search(character, prompt):
            raise ValueError(
                f"{where}: found {what} at position {found.start()} of the prompt, expected UTF-8 text"
            )
    return prompt


def _of_json(line: str, key: str, where: str) -> str:
    try:
        value: Any = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where}: is not JSON: {what}") from error
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found.strip():
        shown = found if isinstance(value, dict) else value
        raise ValueError(f"{where}: {key}: found {shown!r:.80}, expected a prompt")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"found the key {twice!r} twice in an object")
    return found

"""Prompts in a file: one a line, or JSON lines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

LARGEST = 2**20  # characters of one prompt


class Prompts:
    """Prompts of a text file in UTF-8, one a line, or of JSON lines (`*.jsonl`) with the prompt under `key`.

    Empty lines of text files are skipped. They are no `Source` until a stage has encoded them, which the expansion of a
    recipe inserts.

    Args:
        path: the file. key: entry of JSON lines. limit: use the first so many; None: all.

    Raises:
        ValueError, FileNotFoundError: name `path`, with the line: no file, not UTF-8, no JSON, no prompt in it.
    """

    def __init__(self, path: str, key: str = "prompt", limit: int | None = None) -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"path: {path}: no such file; expected prompts, one a line, or JSON lines"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"limit: found {limit}, expected at least 1")
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"path: {path}: is not UTF-8: byte {error.start}; save it as UTF-8") from error
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
        found = [
            _of_json(line, key, f"path: {path}: line {number}") if file.suffix == ".jsonl" else line
            for number, line in lines
            if line
        ]
        if not found:
            raise ValueError(f"path: {path}: holds no prompts; expected one a line")
        self.prompts = found[:limit]

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """sha256 of the prompts."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def _of_json(line: str, key: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from error
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found.strip() or len(found) > LARGEST:
        raise ValueError(f"{where}: {key}: found {found!r:.80}, expected a prompt")
    return found

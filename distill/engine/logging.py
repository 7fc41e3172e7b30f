"""Where numbers of a running training go. A logger gets plain floats a few times a second at most."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from distill.files import append_text, write_text
from distill.typed import parse


def lines_of(entries: Iterable[Mapping[str, float | None]]) -> str:
    """Entries as one JSON object a line; null for what is not finite."""
    finite = [
        {name: v if v is not None and math.isfinite(v) else None for name, v in entry.items()}
        for entry in entries
    ]
    return "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in finite)


class Logger(Protocol):
    """`resume` is called once before training with the step to continue from, `log` with entries that hold
    "step" and "images"."""

    def resume(self, step: int) -> None: ...

    def log(self, entry: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


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


class Jsonl:
    """One JSON object a line in `folder/metrics.jsonl` (null for what is not finite); on resume, entries
    after the checkpoint are dropped, so no step is twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def resume(self, step: int) -> None:
        """Keep the entries up to `step`. Raises ValueError where the file holds something else, see `read_entries`."""
        kept = [entry for entry in read_entries(self.path) if entry["step"] <= step]
        write_text(self.path, lines_of(kept))

    def log(self, entry: Mapping[str, float]) -> None:
        """Append one entry."""
        append_text(self.path, lines_of([entry]))

    def close(self) -> None:
        """Nothing is held open."""
        return


def wandb_id(folder: Path) -> str:
    """The id of the W&B run of a stage, from `folder/wandb_id`; the first call makes one up."""
    path = folder / "wandb_id"
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    found = path.read_bytes().strip() if path.is_file() else b""
    if re.fullmatch(rb"[0-9a-f]{8}", found) is None:
        raise ValueError(f"{path}: found {found[:20]!r}, expected 8 hexadecimal digits")
    return found.decode()


class Wandb:
    """Weights & Biases, joined by a run id that is written to the stage folder before the first step: a
    requeued job continues the same curve. Offline unless WANDB_API_KEY or WANDB_MODE is set, so that a batch
    job never waits for a prompt."""

    @staticmethod
    def check() -> None:
        """Raise ImportError where the package is not installed; asked before anything runs."""
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("loggers=wandb needs the extra: pip install 'distill[wandb]'")

    def __init__(
        self, folder: Path, *, project: str = "distill", settings: Mapping[str, Any] | None = None
    ) -> None:
        self.check()
        import wandb

        online = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
        self.run = wandb.init(
            project=project,
            id=wandb_id(folder),
            resume="allow",
            dir=str(folder),
            mode=None if online else "offline",
            config=dict(settings or {}),
        )
        self.run.define_metric("*", step_metric="images")

    def resume(self, step: int) -> None:
        """Entries carry their own step and image counts; nothing to rewind."""

    def log(self, entry: Mapping[str, float]) -> None:
        """Send one entry."""
        self.run.log(dict(entry))

    def close(self) -> None:
        """End the run, so that the next stage's is its own."""
        self.run.finish()

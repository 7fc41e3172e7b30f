"""Where numbers of a running training go. A logger gets plain floats a few times a second at most."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from distill.files import write_text


class Logger(Protocol):
    """`resume` is called once before training with the step to continue from, `log` with entries that hold
    "step" and "images"."""

    def resume(self, step: int) -> None: ...

    def log(self, entry: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside the block says which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error}") from error


class Jsonl:
    """One JSON object a line in `folder/metrics.jsonl` (null for what is not finite); on resume, entries
    after the checkpoint are dropped, so no step is twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def resume(self, step: int) -> None:
        """Keep the entries up to `step`. A last line cut off by a kill is dropped."""
        kept = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if entry["step"] <= step:
                    kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def log(self, entry: Mapping[str, float]) -> None:
        """Append one entry."""
        with naming(self.path), self.path.open("a") as handle:
            finite = {name: value if math.isfinite(value) else None for name, value in entry.items()}
            handle.write(json.dumps(finite, allow_nan=False) + "\n")

    def close(self) -> None:
        """Nothing is held open."""
        return


class Wandb:
    """Weights & Biases, joined by a run id that is written to the stage folder before the first step: a
    requeued job continues the same curve. Offline unless WANDB_API_KEY or WANDB_MODE is set, so that a batch
    job never waits for a prompt."""

    def __init__(
        self, folder: Path, *, project: str = "distill", settings: Mapping[str, Any] | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("loggers=wandb needs the extra: pip install 'distill[wandb]'") from error
        identity = folder / "wandb_id"
        if not identity.is_file():
            write_text(identity, secrets.token_hex(4))
        online = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
        self.run = wandb.init(
            project=project,
            id=identity.read_text().strip(),
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

"""`stopped.json` of a run: that a signal stopped it, for the script of a job, which queues the job again then.

The exit status does not say it: srun reports that of the process that it ended itself.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.files import remove, write_json
from distill.interrupt import Interrupted
from distill.recipe.plan import Planned
from distill.stages.ownership import ARTIFACT, STOPPED, files_of, patterns, read_object

START = "DISTILL_START"  # set by the script of a job, other in each start of it


class Stops:
    """Notes a stop, and whether this start got anything done. Made before the first stage runs; removes an older note.

    `idle` in the note counts the starts in a row that stopped without a new checkpoint, shard or finished stage: a job whose
    time is too short for one would be queued for ever."""

    def __init__(self, run_folder: Path, planned: Sequence[Planned]) -> None:
        self.path, self.planned = run_folder / STOPPED, planned
        idle = read_object(self.path).get("idle", 0)
        self.idle = idle if isinstance(idle, int) else 0
        self.before = self._work()
        remove(self.path)

    def note(self, stop: Interrupted) -> None:
        """Write the file."""
        stage = next((e.name for e in self.planned if not (e.folder / ARTIFACT).is_file()), None)
        found: dict[str, Any] = {
            "signal": signal.Signals(stop.signum).name,
            "start": os.environ.get(START),
            "stage": stage,
            "idle": self.idle + 1 if self._work() == self.before else 0,
        }
        write_json(self.path, found)

    def _work(self) -> list[tuple[str, int]]:
        """Name and time of every file that a later start continues from."""
        return [
            (f"{entry.name}/{name}", (entry.folder / name).stat().st_mtime_ns)
            for entry in self.planned
            for name in files_of(entry.folder, (*entry.stage.FILES, *patterns(ARTIFACT)))
            if not name.startswith("logs/")
        ]


def await_note(run_folder: Path, seconds: float = 10.0) -> None:
    """On other processes: wait for the main one's note, but not longer. srun and `distill.launch` end all processes after the
    first one has ended with an error status, and it must be written by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (run_folder / STOPPED).is_file():
        time.sleep(0.05)

"""A recording of a few steps by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from distill.files import write_atomic


class Recording(Callback):
    """Records the `steps` steps of the student after its first `start`, with all updates between, and writes them to
    `trace_START-END_RANK.json` in `folder`, for chrome://tracing or Perfetto. A training that ends within them writes what it
    has of them, one that goes on from a later step nothing."""

    def __init__(self, start: int, steps: int, folder: Path, rank: int) -> None:
        self.start, self.steps, self.folder, self.rank = start, steps, folder, rank
        self._profile: profile | None = None
        self._done = False

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        """Begin."""
        if self._profile is None and not self._done and module.progress.step == self.start:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=kinds, record_shapes=True)
            self._profile.start()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        """End, after the last step of the window."""
        if module.progress.step >= self.start + self.steps:
            self._write(module.progress.step)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """End with the training, also where an error ends it."""
        self._write(module.progress.step)

    def _write(self, reached: int) -> None:
        if (recorded := self._profile) is None:
            return
        recorded.stop()
        path = self.folder / f"trace_{self.start}-{reached}_{self.rank}.json"
        write_atomic(path, lambda temporary: recorded.export_chrome_trace(str(temporary)))
        self._profile, self._done = None, True

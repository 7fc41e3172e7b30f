"""Thread count and peak memory of a running stage."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.data.machine import available_cores
from distill.files import read_json, write_json
from distill.stages.base import StageContext
from distill.typed import parse

# Threads by size of the net: (parameters below, threads). For the tiny U-Net, two threads make a step 1.25 times faster on an
# idle machine, and twice as slow next to one other busy process (scripts/bench/threads.py), so it gets one.
THREAD_TABLE = ((1_000_000, 1), (10_000_000, 4), (100_000_000, 8))


@dataclass(frozen=True)
class Execution:
    """The schema of `execution.json`."""

    threads: int


def use_threads(context: StageContext, parameters: int) -> int:
    """Set torch's thread count for a stage; returns it.

    The count is `trainer.threads`, else that of an earlier start of this stage (bit-equal resume needs the same count), else
    that of `THREAD_TABLE`, limited by OMP_NUM_THREADS and this process's share of the cores.

    Raises:
        ValueError: if the count exceeds the number of cores.
    """
    path, cores = context.folder / "execution.json", available_cores()
    wanted = context.settings.threads
    if wanted is not None and wanted > cores:
        raise ValueError(f"trainer.threads: found {wanted}, expected 1 .. {cores}, the cores of this machine")
    if wanted is None and (kept := context.world.decided(lambda: _kept(path))) is not None:
        wanted = kept
        if not 1 <= wanted <= cores:
            raise ValueError(
                f"{path}: threads: found {wanted}, expected 1 .. {cores}, the cores of this machine; type trainer.threads="
                f"{cores} to continue with another count, which changes the last bits of sums"
            )
    if wanted is None:
        wanted = table_threads(parameters, context.world.local_size)
    if context.world.main:
        write_json(path, {"threads": wanted})
    torch.set_num_threads(wanted)
    return wanted


def _kept(path: Path) -> int | None:
    """The count of an earlier start."""
    return parse(Execution, read_json(path), f"{path}: ").threads if path.exists() else None


def table_threads(parameters: int, processes: int = 1) -> int:
    """Return the threads for a net with so many parameters, where `processes` share the machine."""
    cores = available_cores()
    share = max(1, min(cores, openmp_threads() or cores) // processes)
    return min(share, next((threads for below, threads in THREAD_TABLE if parameters < below), share))


def openmp_threads() -> int | None:
    """Return OMP_NUM_THREADS, of a list (one count per nesting level) the first; None if it is not set.

    Raises ValueError if it is not a positive integer."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return None
    first = text.split(",")[0].strip()
    if re.fullmatch("[0-9]+", first) is None or len(first) > 9 or int(first) < 1:
        raise ValueError(f"OMP_NUM_THREADS: found {text!r}, expected an integer of at least 1, or unset")
    return int(first)


class PeakMemory:
    """Peak memory since construction: for CUDA, the memory allocated by torch; for a CPU, the resident memory of the process,
    including Python and libraries."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            self.RESET.write_text("5")  # Linux: reset the peak of the resident memory
            self.known = self._status("VmHWM") <= self._status("VmRSS") + 2**20
        except (OSError, ValueError):
            self.known = False

    def bytes(self) -> int | None:
        """Return the peak so far; None if the system cannot reset the peak."""
        if not self.known:
            return None
        return (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else self._status("VmHWM")
        )

    def _status(self, key: str) -> int:
        found = re.search(rf"^{key}:\s*(\d+) kB$", self.STATUS.read_text(), re.MULTILINE)
        if found is None:
            raise ValueError(f"{self.STATUS}: no {key}")
        return int(found[1]) * 1024

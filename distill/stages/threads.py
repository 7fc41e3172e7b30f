"""Threads and memory of a running stage."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.files import read_json, write_json
from distill.stages.base import StageContext
from distill.typed import parse

# Threads that a net can use: (parameters below, threads). Small nets spend their time between operations: two threads
# make a step of the tiny U-Net 1.25 times faster on an idle machine and twice as slow beside one other busy process
# (scripts/bench/threads.py), so it gets one.
THREAD_TABLE = ((1_000_000, 1), (10_000_000, 4), (100_000_000, 8))


@dataclass(frozen=True)
class Execution:
    """What `execution.json` of a stage holds."""

    threads: int


def use_threads(context: StageContext, parameters: int) -> int:
    """Set torch's thread count for a stage: the option, else what an earlier start of the stage wrote down
    (bit-equal resume needs the same count), else the table, within OMP_NUM_THREADS and this process's share of the
    cores. Raises ValueError where more are asked for than there are cores."""
    path, cores = context.folder / "execution.json", available_cores()
    wanted = context.settings.threads
    if wanted is not None and wanted > cores:
        raise ValueError(f"trainer.threads: found {wanted}, expected 1 .. {cores}, the cores of this machine")
    if wanted is None and path.exists():
        wanted = parse(Execution, read_json(path), f"{path}: ").threads
        if not 1 <= wanted <= cores:
            raise ValueError(
                f"{path}: threads: found {wanted}, expected 1 .. {cores}, the cores of this machine; trainer.threads={cores} "
                "goes on with another count, and sums then differ in their last bits"
            )
    if wanted is None:
        share = max(1, min(cores, openmp_threads() or cores) // context.world.local_size)
        wanted = min(share, next((threads for below, threads in THREAD_TABLE if parameters < below), share))
    context.world.barrier()  # nobody reads what is being written
    if context.world.main:
        write_json(path, {"threads": wanted})
    torch.set_num_threads(wanted)
    return wanted


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def openmp_threads() -> int | None:
    """OMP_NUM_THREADS (of a list, which says it by level, the first); None where it is not set."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return None
    first = text.split(",")[0].strip()
    if re.fullmatch("[0-9]+", first) is None or len(first) > 9 or int(first) < 1:
        raise ValueError(f"OMP_NUM_THREADS: found {text!r}, expected a whole number of at least 1, or unset")
    return int(first)


class PeakMemory:
    """The most memory since this was made: of a CUDA device, what torch allocated; of a CPU, this process's resident
    memory, with Python, libraries and what was held before."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            self.RESET.write_text("5")  # Linux: the peak of the resident memory begins again
            self.known = self._status("VmHWM") <= self._status("VmRSS") + 2**20
        except (OSError, ValueError):
            self.known = False

    def bytes(self) -> int | None:
        """The peak so far; None where the system does not tell it for a part of a process's life."""
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

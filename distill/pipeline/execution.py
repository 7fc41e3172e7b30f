"""Threads and memory of a running stage."""

from __future__ import annotations

import os
import resource
import sys

import torch

from distill.files import read_json, write_json
from distill.pipeline.stage import Room

# Threads that a net can use: (parameters below, threads). Small nets spend their time between operations: two threads
# make a step of the tiny U-Net 1.25 times faster on an idle machine and twice as slow beside one other busy process
# (scripts/bench/threads.py), so it gets one.
THREAD_TABLE = ((1_000_000, 1), (10_000_000, 4), (100_000_000, 8))


def use_threads(room: Room, parameters: int) -> int:
    """Set torch's thread count for a stage: the option, else what an earlier start of the stage wrote down
    (bit-equal resume needs the same count), else the table, within OMP_NUM_THREADS and this process's share of the
    cores."""
    path = room.folder / "execution.json"
    wanted = room.settings.threads
    if wanted is None and path.is_file():
        wanted = int(read_json(path)["threads"])
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        if os.environ.get("OMP_NUM_THREADS", "").isdigit():
            cores = min(cores, max(1, int(os.environ["OMP_NUM_THREADS"])))
        share = max(1, cores // room.world.local_size)
        wanted = min(share, next((threads for below, threads in THREAD_TABLE if parameters < below), share))
    room.world.barrier()  # nobody reads what is being written
    if room.world.main:
        write_json(path, {"threads": wanted})
    torch.set_num_threads(wanted)
    return wanted


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device, or on a CPU the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

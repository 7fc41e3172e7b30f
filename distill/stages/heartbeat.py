"""Signs of life of the process that holds a lock, for disks on which the kernel's locks end at the machine.

On some network file systems (Lustre with `localflock`, NFS without its lock service) two machines get the same lock. Its holder
therefore renews the time of the lock file every `BEAT` seconds, and a process of another machine that gets the lock waits until
three beats are missed, unless the holder has let go, or Slurm says that its job no longer runs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

BEAT = 20.0  # seconds
MISSED = 3  # beats
RUNS = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")


def owner() -> dict[str, Any]:
    """This process, as the lock file names it: with its job and how often that was restarted, in a job of Slurm."""
    found: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        if (element := os.environ.get("SLURM_ARRAY_TASK_ID")) is not None:  # one has the number of the array
            job = f"{os.environ.get('SLURM_ARRAY_JOB_ID', job)}_{element}"
        found |= {"job": job, "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}
    return found


@contextmanager
def beating(handle: BinaryIO) -> Iterator[None]:
    """Renew the time of an open file inside the block, from a thread."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):  # `Held.check` says what happened to the file
                os.utime(handle.fileno())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def alive(path: Path, last: Mapping[str, Any]) -> bool:
    """Whether the process `last`, which the lock file `path` names, still renews it, for a process that has got the lock. Waits
    up to three beats where it may.

    A process of this machine is dead then: the kernel would not have given its lock away."""
    if last.get("released") or last.get("host") in (None, socket.gethostname()):
        return False
    job, now = last.get("job"), owner()
    if job is not None and job == now.get("job") and last.get("restart") != now["restart"]:
        return False  # this job itself, before it was requeued
    if job is not None and not _in_queue(str(job)):
        return False
    seen, deadline = _time(path), time.monotonic() + MISSED * BEAT
    while time.monotonic() < deadline:
        time.sleep(BEAT / 10)
        if _time(path) != seen:
            return True
    return False


def _time(path: Path) -> int:
    """The file's time of modification; it is opened, since only then network file systems ask their server."""
    with path.open("rb") as handle:
        return os.fstat(handle.fileno()).st_mtime_ns


def _in_queue(job: str) -> bool:
    """Whether Slurm's job may run; also where Slurm cannot be asked."""
    try:
        found = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%T"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    if found.returncode:
        return "Invalid job id" not in found.stderr
    return any(state in RUNS for state in found.stdout.split())

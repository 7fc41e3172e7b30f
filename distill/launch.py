"""Starts the processes of a run on this machine: `trainer.devices=N` needs no other launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType


def needed(devices: int) -> bool:
    """Whether this process should start the others rather than be one of them."""
    return isinstance(devices, int) and devices > 1 and os.environ.get("WORLD_SIZE", "1") == "1"


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In the child: be killed when the launcher is (PR_SET_PDEATHSIG; Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def launch(module: str, arguments: Sequence[str], devices: int) -> int:
    """Run `python -m module arguments` `devices` times with the environment of torchrun; returns the exit code of the run.

    SIGINT and SIGTERM are passed on. When one process fails, the others are ended: they would wait for it for ever."""
    environment = os.environ | {
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            process_group=0,  # a Ctrl-C reaches them once, from here
            preexec_fn=_die_with_parent,  # no threads exist yet
        )
        for rank in range(devices)
    ]

    def pass_on(signum: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(children)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; after the first failure give the others a moment, then end them."""
    failed, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        codes = [child.returncode for child in children if child.returncode not in (None, 0)]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + 5.0
        if time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)
    codes = [child.returncode for child in children if child.returncode != 0]
    failed = failed or (codes[0] if codes else 0)
    return 128 - failed if failed < 0 else failed

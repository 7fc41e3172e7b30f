"""Starts the processes of a run with `trainer.devices=N` on this machine."""

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

PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def needed(devices: int) -> bool:
    """Return whether this process must start the processes of the run."""
    return isinstance(devices, int) and devices > 1 and os.environ.get("WORLD_SIZE", "1") == "1"


def free_port() -> int:
    """Return an unused TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In the child: get SIGKILL when the launcher dies (PR_SET_PDEATHSIG; only on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def launch(module: str, arguments: Sequence[str], devices: int) -> int:
    """Run `python -m module arguments` in `devices` processes with the environment variables of torchrun.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on. If a process fails, the others are killed after 5 s, because they would
    wait for it.

    Returns:
        The exit code of the run: that of the first failed process, or 0.
    """
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
            process_group=0,  # so that Ctrl-C reaches them only through `pass_on`
            preexec_fn=_die_with_parent,  # safe: there are no threads yet
        )
        for rank in range(devices)
    ]

    def pass_on(signum: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    previous = {number: signal.signal(number, pass_on) for number in PASSED}
    try:
        return _wait(children)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes; kill the others 5 s after the first failure."""
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

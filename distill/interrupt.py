"""SIGINT and SIGTERM: outside training they end the run at once (nothing is ever half written); while
training they wait for the end of the iteration, so that a checkpoint can be saved first. A second signal does
not wait."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal sends Ctrl-C to all processes of a group, and the launcher passes it on: one press, two signals.
ECHO_SECONDS = 1.0


class Interrupted(BaseException):
    """The run was asked to stop. Not an `Exception`: no handler for errors may swallow it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


class _State:
    signum: int | None = None
    since: float = 0.0
    deferred: bool = False
    watching: bool = False


def _handle(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.signum is not None and now - _State.since < ECHO_SECONDS:
        return
    again, _State.signum, _State.since = _State.signum is not None, signum, now
    if again or not _State.deferred:
        raise Interrupted(signum)


@contextmanager
def watch() -> Iterator[None]:
    """Handle the signals inside the block; the previous handlers come back after it."""
    previous = {number: signal.signal(number, _handle) for number in SIGNALS}
    _State.signum, _State.deferred, _State.watching = None, False, True
    try:
        yield
    finally:
        _State.watching = False
        for number, handler in previous.items():
            signal.signal(number, handler)


def reinstall() -> None:
    """Take the signals back from a library that has put handlers of its own before ours; nothing outside `watch`."""
    if _State.watching:
        for number in SIGNALS:
            signal.signal(number, _handle)


@contextmanager
def deferred() -> Iterator[None]:
    """Only note a first signal inside the block; whoever runs there asks `requested` and stops where it
    can."""
    _State.deferred = True
    try:
        yield
    finally:
        _State.deferred = False


def requested() -> int | None:
    """The signal that was noted, or None."""
    return _State.signum

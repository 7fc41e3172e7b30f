"""Handling of SIGINT and SIGTERM, and of SIGUSR1 and SIGUSR2, with which schedulers of clusters warn. Outside training they end
the run at once: files are written atomically. During training they are deferred to the end of the iteration, so that a
checkpoint can be saved. A second signal ends the run at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGUSR2 as well: some schedulers and tools avoid SIGUSR1, which other libraries use.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)
# A terminal sends Ctrl-C to all processes of a group, and the launcher passes it on: one press, two signals.
ECHO_SECONDS = 1.0


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an `Exception`, so that handlers of errors do not catch it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


class _State:
    signum: int | None = None
    since: float = 0.0
    deferred: bool = False
    handlers: Mapping[int, Any] | None = None  # our handlers; None outside `watch` and `taken`
    early: int | None = None  # a warning that came before `watch`


def _handle(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.signum is not None and now - _State.since < ECHO_SECONDS:
        return
    again, _State.signum, _State.since = _State.signum is not None, signum, now
    if again or not _State.deferred:
        raise Interrupted(signum)


def expect() -> None:
    """Keep a scheduler's warning that comes while the command starts, for `watch`; by default it would end the process at
    once, as a failed one."""

    def keep(signum: int, frame: FrameType | None) -> None:
        _State.early = signum

    for number in WARNINGS:
        signal.signal(number, keep)


@contextmanager
def watch() -> Iterator[None]:
    """Handle the signals inside the block; restore the previous handlers after it. A warning that came before
    (`expect`) is handled at `check`."""
    early, _State.early = _State.early, None
    with _handlers(dict.fromkeys(SIGNALS, _handle)):
        _State.signum = early
        yield


def check() -> None:
    """Raise `Interrupted` for a signal that was only recorded."""
    if _State.signum is not None:
        raise Interrupted(_State.signum)


@contextmanager
def taken() -> Iterator[None]:
    """`watch` for a call from a user's program; does nothing inside `watch`.

    An ignored signal stays ignored. Any other one ends the block with `Interrupted`, and then does what the program expects:
    SIGINT raises KeyboardInterrupt; SIGTERM calls the previous handler, which by default ends the process. Python handles
    signals in the main thread only, so in another thread nothing changes."""
    if _State.handlers is not None or not _main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    # None: a handler from outside Python, which could not be put back.
    kept = (signal.SIG_IGN, None)
    ours: dict[int, Any] = {n: h if h in kept else _handle for n, h in before.items() if h is not None}
    try:
        with _handlers(ours):
            yield
    except Interrupted as error:
        if before[error.signum] is signal.default_int_handler:
            raise KeyboardInterrupt from None
        signal.raise_signal(error.signum)
        raise  # the handler returned


@contextmanager
def _handlers(handlers: Mapping[int, Any]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    _State.signum, _State.deferred, _State.handlers = None, False, handlers
    try:
        yield
    finally:
        _State.signum, _State.handlers = None, None
        for number, handler in previous.items():
            signal.signal(number, handler)


def reinstall() -> None:
    """Set our handlers again after a library has replaced them; does nothing outside `watch`."""
    if _State.handlers is not None and _main_thread():
        for number, handler in _State.handlers.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the block a first signal is only recorded: code there checks `requested` and stops when it can. Signals
    interrupt the main thread, so in another thread nothing is deferred."""
    if not _main_thread():
        yield
        return
    _State.deferred = True
    try:
        yield
    finally:
        _State.deferred = False


def requested() -> int | None:
    """The signal that was received, or None."""
    return _State.signum


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

"""Ctrl-C and SIGTERM where `train` is called from a program of the user's: a checkpoint, and then what Python does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_support import checkpoint_of
from test_engine import Points, fit, make, weights
from tests_support import forked

from distill import interrupt
from distill.engine.fit import Fit, train


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The test's handlers are those of a plain Python program, and are back afterwards whatever happened."""
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopping(folder: Path, act: Callable[[], object], at: int = 4, steps: int = 12) -> None:
    """Train, and `act` when a step has been logged."""
    method = make()

    def on_progress(step: int, text: str) -> None:
        if step == at and not text:
            act()

    train(method, Points(), Fit(steps, 8), folder=folder, config={"a": 1}, on_progress=on_progress)


def saved(folder: Path) -> int:
    return int(checkpoint_of(folder)["progress"]["step"])


def test_ctrl_c_raises_keyboard_interrupt_and_the_next_call_goes_on(tmp_path: Path) -> None:
    whole = weights(fit(make(), tmp_path / "whole", steps=12))
    with pytest.raises(KeyboardInterrupt):
        stopping(tmp_path / "parts", lambda: signal.raise_signal(signal.SIGINT))
    assert saved(tmp_path / "parts") == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert interrupt.requested() is None, "a later training would stop at once"
    parts = weights(fit(make(), tmp_path / "parts", steps=12))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_trial_stops_as_well_and_saves_nothing(tmp_path: Path) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, interrupt.Interrupted)):
        method = make()

        def stop(step: int, text: str, number: signal.Signals = number) -> None:
            if step == 2 and not text:
                signal.raise_signal(number)

        with pytest.raises(error):
            train(method, Points(), Fit(12, 8, fast_dev_run=20), folder=tmp_path, on_progress=stop)
        assert method.progress.step == 2
    assert not list(tmp_path.iterdir())


def test_a_keyboard_interrupt_of_a_callback_stays_one(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopping(tmp_path, stop)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_is_called_after_the_checkpoint(tmp_path: Path) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(saved(tmp_path)))
    with pytest.raises(interrupt.Interrupted):
        stopping(tmp_path, lambda: signal.raise_signal(signal.SIGTERM))
    assert seen == [4]


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_an_ignored_signal_stays_ignored(tmp_path: Path, number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    stopping(tmp_path, lambda: os.kill(os.getpid(), number))
    assert saved(tmp_path) == 12
    assert signal.getsignal(number) is signal.SIG_IGN


def test_training_in_a_thread(tmp_path: Path) -> None:
    """A notebook's or a server's thread: Python gives it no signals, and it must not ask for them."""
    ended: list[BaseException | None] = []

    def work() -> None:
        try:
            stopping(tmp_path / "plain", lambda: None)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert ended == [None]
    assert saved(tmp_path / "plain") == 12

    def interrupted() -> None:
        try:
            stopping(tmp_path / "stopped", stop)
        except BaseException as error:
            ended.append(error)

    def stop() -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join(60)
    assert isinstance(ended[1], KeyboardInterrupt)


def test_a_thread_under_a_watch_stops_with_a_checkpoint(tmp_path: Path) -> None:
    """The main thread is stopped at once; the training sees the signal after its iteration."""
    ended: list[BaseException] = []
    ready, go = threading.Event(), threading.Event()

    def act() -> None:
        ready.set()
        go.wait(30)

    def work() -> None:
        try:
            stopping(tmp_path, act)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    with interrupt.watch():
        thread.start()
        ready.wait(30)
        with pytest.raises(interrupt.Interrupted):
            signal.raise_signal(signal.SIGINT)
        go.set()
        thread.join(60)
    assert isinstance(ended[0], interrupt.Interrupted)
    assert saved(tmp_path) == 4


def test_sigterm_ends_the_program_as_it_would_have_with_a_checkpoint(tmp_path: Path) -> None:
    ended = forked(stopping, tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert ended == -signal.SIGTERM
    assert saved(tmp_path) == 4

"""Progress of stages: a bar in a terminal, lines in a log, and what they say."""

from __future__ import annotations

import io
import re
import sys

import pytest

from distill.stages import display
from distill.stages.base import Settings
from distill.stages.display import Display, clock


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test moves."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def run(shown: Display, seconds: list[float], start: int = 0) -> None:
    """100 steps of 64 images, two a second, with a loss; continued from `start`."""
    with shown.bar(100, images=64) as bar:
        for step in range(start, 101):
            if step % 20 == 0:
                bar.note(f"loss {step / 100:g}")
            bar.reach(step)
            seconds[0] += 0.5


def test_a_log_gets_a_line_every_30_seconds_and_one_at_the_end(
    seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run(Display("distill", 2, 5), seconds)
    assert capsys.readouterr().err.splitlines() == [
        "[2/5] distill: 60/100 steps, loss 0.6, 128 images/s, 0:20 left",
        "[2/5] distill: 100/100 steps, loss 1, 127 images/s, in 0:50",
    ]
    # What an earlier start did takes no part in the speed.
    run(Display("distill", 2, 5), seconds, start=60)
    assert capsys.readouterr().err == "[2/5] distill: 100/100 steps, loss 1, 125 images/s, in 0:20\n"
    shown = Display("pairs")
    with shown.bar(3000, unit="pair") as bar:
        bar.update(0)
        seconds[0] += 2
        bar.update(3000)
        shown.line("a\tmessage")
    assert capsys.readouterr().err.splitlines() == [
        r"[1/1] pairs: a\tmessage",
        "[1/1] pairs: 3000/3000 pairs, 1,500 pairs/s, in 0:02",
    ]


def test_a_failed_stage_does_not_say_that_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(shown: Display) -> None:
        with shown.bar(10):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail(Display())
    assert capsys.readouterr().err == ""


def test_none_shows_messages_alone_and_other_processes_nothing(
    seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for shown, left in ((Display(kind="none"), "[1/1] : hello\n"), (Display(silent=True), "")):
        run(shown, seconds)
        shown.line("hello")
        assert capsys.readouterr().err == left


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("term", "kind", "drawn"), [("xterm", "auto", True), ("dumb", "auto", False), ("xterm", "lines", False)]
)
def test_a_terminal_gets_a_bar(
    term: str, kind: str, drawn: bool, seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "120")
    shown = Display("[bold]distill", 2, 5, kind=kind)
    run(shown, seconds)
    assert sys.stderr is terminal
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert ("\u2501" in plain) == drawn
    if drawn:
        frames = [part.strip() for part in re.split(r"[\r\n]", plain) if part.strip()]
        assert len(frames) > 50
        assert all(frame.startswith("[2/5] [bold]distill") for frame in frames), "no markup"
        assert "60/100 loss 0.6, 128 images/s, 0:20 left" in plain
        assert frames[-1].endswith("100/100 loss 1, 127 images/s, in 0:50")


def test_clock_and_option() -> None:
    assert [clock(seconds) for seconds in (0.4, 65, 7265)] == ["0:00", "1:05", "2:01:05"]
    with pytest.raises(
        ValueError, match=r"progress: found 'loud', expected one of .'auto', 'bar', 'lines', 'none'."
    ):
        Settings(progress="loud")

"""Progress and messages of running stages: a bar in a terminal, a line from time to time in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from distill.terminal import line, printable

KINDS = ("auto", "bar", "lines", "none")
EVERY = {"bar": 0.2, "lines": 30.0}  # seconds between what is shown


class Bar:
    """The progress of one stage over `total` units.

    Args:
        unit: name of a unit. images: images a unit; 0 where units are not made of images, or are images themselves.
        show: draws the bar; the second argument says whether this is the end. every: seconds between calls.
    """

    def __init__(
        self, total: int, unit: str, images: int, show: Callable[[Bar, bool], None], every: float
    ) -> None:
        self.total, self.unit, self.images = total, unit, images
        self.done, self._note, self._show, self._every = 0, "", show, every
        self._start = self._shown = time.monotonic()
        # Time and units at the first update: speed is counted from there, without what an earlier start did.
        self._first: tuple[float, int] | None = None

    def note(self, text: str) -> None:
        """What is said beside the numbers from now on, such as the loss."""
        self._note = text

    def reach(self, done: int) -> None:
        """So many units are done."""
        now, self.done = time.monotonic(), done
        if self._first is None:
            self._first = (now, done)
        if now - self._shown >= self._every:
            self._shown = now
            self._show(self, False)

    def update(self, count: int = 1) -> None:
        """So many more units are done."""
        self.reach(self.done + count)

    def end(self) -> None:
        """All that will be done is done."""
        self._show(self, True)

    def facts(self, *, ended: bool = False) -> str:
        """Note, speed, and time left, or in the end time spent."""
        parts, now = [self._note] if self._note else [], time.monotonic()
        since, before = self._first or (now, self.done)
        seconds, units = now - since, self.done - before
        if units > 0 and seconds > 0:
            speed = units / seconds
            shown, what = (speed * self.images, "images") if self.images else (speed, f"{self.unit}s")
            parts.append(f"{shown:.3g} {what}/s" if shown < 1000 else f"{shown:,.0f} {what}/s")
            if not ended:
                parts.append(f"{clock((self.total - self.done) / speed)} left")
        if ended:
            parts.append(f"in {clock(now - self._start)}")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """1:05 of 65 seconds, 2:01:05 of two hours more."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True)
class Display:
    """Bars and messages of stage `number` of `total`, on standard error; standard output has only results.

    kind: "bar", "lines" (one every 30 s, and one at the end), "none" (messages alone), or "auto": a bar in a terminal, else
    lines. silent: nothing at all, for other processes than the main one."""

    name: str = ""
    number: int = 1
    total: int = 1
    silent: bool = False
    kind: str = "auto"

    @property
    def title(self) -> str:
        """[2/5] NAME."""
        return f"[{self.number}/{self.total}] {line(self.name)}"

    @contextmanager
    def bar(self, total: int, *, unit: str = "step", images: int = 0) -> Iterator[Bar]:
        """Show the progress over `total` units, of `images` images each where it is not 0."""
        kind = "none" if self.silent else self.kind
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "lines"
        if kind == "bar":
            with self._drawn(total, unit, images) as bar:
                yield bar
            return

        def say(bar: Bar, ended: bool) -> None:
            if kind == "lines":
                done = f"{bar.done}/{bar.total} {bar.unit}s"
                self.line(", ".join(part for part in (done, bar.facts(ended=ended)) if part))

        bar = Bar(total, unit, images, say, EVERY["lines"])
        yield bar
        bar.end()

    @contextmanager
    def _drawn(self, total: int, unit: str, images: int) -> Iterator[Bar]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        # Drawn by this thread alone: a process that is forked while another one draws would keep its lock.
        drawn = Progress(*columns, console=Console(file=sys.stderr), auto_refresh=False)
        with drawn:
            task = drawn.add_task(self.title, total=total, facts="")

            def draw(bar: Bar, ended: bool) -> None:
                drawn.update(task, completed=bar.done, facts=bar.facts(ended=ended), refresh=True)

            bar = Bar(total, unit, images, draw, EVERY["bar"])
            yield bar
            bar.end()

    def line(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if not self.silent:
            print(printable(f"[{self.number}/{self.total}] {self.name}: {text}"), file=sys.stderr, flush=True)

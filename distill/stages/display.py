"""Progress bars and messages of running stages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from distill.terminal import line, printable


@dataclass(frozen=True)
class Display:
    """Bars and messages of stage `number` of `total`, on standard error; standard output has only results."""

    name: str = ""
    number: int = 1
    total: int = 1
    silent: bool = False

    @contextmanager
    def bar(self, total: int, *, initial: int = 0, unit: str = "step") -> Iterator[tqdm]:
        """Show a progress bar over `total` units, of which `initial` are done."""
        interactive = sys.stderr.isatty()
        bar = tqdm(
            total=total,
            initial=initial,
            unit=unit,
            desc=f"[{self.number}/{self.total}] {line(self.name)}",
            ncols=None if interactive and shutil.get_terminal_size((0, 0)).columns else 80,
            mininterval=0.2 if interactive else 10.0,
            ascii=not interactive,
            file=sys.stderr,
            disable=self.silent,
        )
        with bar:
            yield bar

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        if self.silent:
            return
        tqdm.write(printable(f"[{self.number}/{self.total}] {self.name}: {text}"), file=sys.stderr)

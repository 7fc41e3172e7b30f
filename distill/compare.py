"""`python -m distill.compare runs/* [metric=fd] [out=comparison]`: several runs in one table and one plot.

A path is a run folder, an evaluation folder or a metrics.json. Runs that were measured under different protocols are
refused. Writes comparison.md and comparison.png into the folder `out`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from distill import terminal
from distill.evaluation import comparison, curve
from distill.files import write_text
from distill.stages.outputs import check_comparison

PAGE, PICTURE = "comparison.md", "comparison.png"


@dataclass
class Options:
    """paths: what to compare; metric: what the plot shows, a key of the rows such as fd, kid or recall; out: the folder
    that the page and the plot are written to."""

    metric: str = "fd"
    out: str = "comparison"
    paths: list[str] = field(default_factory=list, init=False)


def parse(arguments: list[str]) -> Options:
    """Paths and key=value arguments -> Options; errors name the key and the nearest valid one."""
    paths, named = terminal.split_arguments(arguments, Options)
    try:
        options = terminal.read_options(Options, named)
    except ValueError as error:
        raise ValueError(f"{error}, or a path") from error
    options.paths = [os.path.expanduser(terminal.check_utf8(path, "runs")) for path in paths]
    return options


def main() -> None:
    """Read, check, print, write."""
    with terminal.report_errors():
        if terminal.asked_for_help(__doc__, Options.__doc__):
            return
        options = parse(sys.argv[1:])
        out = Path(options.out).expanduser()
        if out.exists() and not out.is_dir():
            raise ValueError(f"out: {out} is a file, expected a folder")
        check_comparison(out / PAGE, out / PICTURE, curve.SOFTWARE)
        files, without = comparison.find(options.paths)
        runs = comparison.read(files)
        comparison.check_protocols(runs)
        missing = comparison.check_metric(runs, options.metric)
        notes = comparison.remarks(runs, without, options.metric, missing)
        curve.save(curve.draw(runs, options.metric), out / PICTURE)
        write_text(out / PAGE, comparison.page(runs, PICTURE, options.metric, notes))
        lines = [
            comparison.aligned(comparison.table(runs, mark="*{}")),
            f"\nProtocol of all rows: {comparison.protocol(runs).describe()}.",
            *(f"note: {line}" for line in notes),
            f"{out / PAGE}, {out / PICTURE}",
        ]
        print(terminal.printable("\n".join(lines)))


if __name__ == "__main__":
    main()

"""`python -m distill.compare runs/* [metric=fd] [out=comparison]`: several runs in one table and one plot.

A path is a run folder, an evaluation folder or a metrics.json. Runs that were measured under different protocols are
refused. Writes comparison.md and comparison.png into the folder `out`.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from distill.evaluation import comparison, curve
from distill.files import write_text

PAGE, PICTURE = "comparison.md", "comparison.png"


@dataclass
class Options:
    """paths: what to compare; metric: what the plot shows, a key of the rows such as fd, kid or recall; out: the folder
    that the page and the plot are written to."""

    paths: list[str] = field(default_factory=list)
    metric: str = "fd"
    out: str = "comparison"


def parse(arguments: list[str]) -> Options:
    """Paths and key=value arguments -> Options; errors name the key and the nearest valid one."""
    options, keys = Options(), ("metric", "out")
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in keys:
            setattr(options, key, value)
        elif argument.startswith("-") or (equals and not Path(argument).exists()):
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]}=?" if near else ""
            raise ValueError(
                f"{argument}: expected a path or key=value with a key among {', '.join(keys)}{hint}"
            )
        else:
            options.paths.append(argument)
    return options


def main() -> None:
    """Read, check, print, write."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{Options.__doc__}")
        return
    try:
        options = parse(sys.argv[1:])
        out = Path(options.out)
        if out.exists() and not out.is_dir():
            raise ValueError(f"out: {out} is a file, expected a folder")
        files, without = comparison.find(options.paths)
        runs = comparison.read(files)
        comparison.check_protocols(runs)
        missing = comparison.check_metric(runs, options.metric)
        told = comparison.remarks(runs, without, options.metric, missing)
        curve.save(curve.draw(runs, options.metric), out / PICTURE)
        write_text(out / PAGE, comparison.page(runs, PICTURE, options.metric, told))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(comparison.aligned(comparison.table(runs, mark="*{}")))
    print(f"\nProtocol of all rows: {comparison.protocol(runs).describe()}.")
    print("".join(f"note: {line}\n" for line in told), end="")
    print(f"{out / PAGE}, {out / PICTURE}")


if __name__ == "__main__":
    main()

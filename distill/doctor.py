"""`python -m distill.doctor runs/x [json=true] [evaluation=FOLDER]`: what is off in a run, finished or under way.

Compares curves, samples and rows with the recipe's reference band (recipes/reference/RECIPE.json, from runs of three seeds),
and names the faults that it knows, with the numbers and what to try. Of a run with another method, data, network or steps
than the band's it says so, and uses the checks that need no reference. Exit status: 0 where all is well, 1 where something is
off, or, with a message, where the run cannot be read.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from distill import terminal
from distill.recipe.compose import RECIPES


@dataclass
class Options:
    """json: print one JSON object instead of text; evaluation: a folder of distill.evaluate, of samples that this run's
    student made elsewhere, to be compared with the run's own."""

    json: bool = False
    evaluation: str | None = None
    run: str = field(default="", init=False)


def parse(arguments: list[str]) -> Options:
    """A run folder and key=value arguments -> Options. Raises ValueError naming what is missing or unknown."""
    paths, named = terminal.split_arguments(arguments, Options)
    options = terminal.read_options(Options, named)
    if len(paths) != 1:
        raise ValueError(f"run: found {len(paths)} paths, expected one run folder, such as runs/sid")
    options.run = os.path.expanduser(terminal.check_utf8(paths[0], "run"))
    return options


def main() -> None:
    """Read the run, print the verdict."""
    with terminal.report_errors():
        if terminal.asked_for_help(__doc__, Options.__doc__):
            return
        options = parse(sys.argv[1:])
        # Imports torch, which --help does not need.
        from distill.evaluation import verdict
        from distill.evaluation.band import read_band
        from distill.evaluation.faults import diagnose
        from distill.stages.examination import examine

        run = examine(Path(options.run), options.evaluation)
        band = read_band(RECIPES / "reference" / f"{run.recipe}.json")
        findings = diagnose(run, band)
        if options.json:
            print(json.dumps(verdict.plain(run, band, findings), indent=2))
        else:
            print(terminal.printable(verdict.text(run, band, findings)))
        if findings:
            sys.exit(1)


if __name__ == "__main__":
    main()

"""What `distill.doctor` prints: the run, what it was compared with, and each fault with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distill.evaluation.band import Band, differing
from distill.evaluation.examined import Examined
from distill.evaluation.faults import CHECKS, Finding


def compared(run: Examined, band: Band | None) -> list[str]:
    """Sentences that say for which stages the reference band holds, and which optimizer settings are others than its runs'."""
    if band is None:
        return [f"no reference band for the recipe {run.recipe}: only the checks that need none"]
    seeds = ", ".join(str(seed) for seed in band.seeds)
    lines = [f"reference band of {band.recipe}: seeds {seeds}, commit {band.made.get('commit', 'unknown')}"]
    for name, stage in run.stages.items():
        known = band.stages.get(name)
        if known is None:
            lines.append(f"{name}: not in the band, so its curves are compared with nothing")
        elif other := differing(known.settings, stage.settings):
            lines.append(
                f"{name}: the band does not hold for it, its curves are compared with nothing: {_some(other)}"
            )
        elif other := differing(known.optim, stage.optim):
            lines.append(f"{name}: compared; its optimizers differ: {_some(other)}")
        else:
            lines.append(f"{name}: compared")
    return lines


def _some(lines: Sequence[str], count: int = 3) -> str:
    return "; ".join([*lines[:count], *([f"and {len(lines) - count} more"] if len(lines) > count else [])])


def _progress(run: Examined) -> str:
    return ", ".join(
        f"{name} {round(stage.at * stage.steps)} of {stage.steps} steps" for name, stage in run.stages.items()
    )


def text(run: Examined, band: Band | None, findings: Sequence[Finding]) -> str:
    """The verdict for a terminal."""
    lines = [f"{run.name}: recipe {run.recipe}, seed {run.seed}; {_progress(run)}"]
    lines += [f"  {line}" for line in [*compared(run, band), *run.notes]]
    for finding in findings:
        lines += ["", f"OFF: {finding.fault} ({finding.place})"]
        lines += [f"  {evidence.describe()}" for evidence in finding.evidence]
        lines.append(f"  try: {finding.advice}")
    found = {finding.fault for finding in findings}
    well = [check.fault for check in CHECKS if check.fault not in found]
    lines += [
        "",
        f"No sign of: {', '.join(well)}." if findings else f"All is well. No sign of: {', '.join(well)}.",
    ]
    return "\n".join(lines)


def plain(run: Examined, band: Band | None, findings: Sequence[Finding]) -> dict[str, Any]:
    """The verdict as plain containers."""
    return {
        "run": run.name,
        "recipe": run.recipe,
        "seed": run.seed,
        "stages": {name: {"steps": stage.steps, "done": stage.at} for name, stage in run.stages.items()},
        "compared": compared(run, band),
        "notes": list(run.notes),
        "findings": [asdict(finding) for finding in findings],
    }

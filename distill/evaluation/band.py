"""The reference band of a recipe: between which values its curves and rows lie in runs that are well.

A limit is mean +- max(4 s, 0.25 m) of the runs of several seeds. Curves are means over each twentieth of the planned steps;
s is the standard deviation over seeds there and in two bins to each side, m the larger of |mean| and the curve's median
|mean|. Of rows, s and m are those of the row. `scripts/reference.py` makes the file of a recipe from finished runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.evaluation.examined import Examined, Measured, Trained, binned, mean
from distill.evaluation.metric import metrics
from distill.files import read_json, write_json
from distill.typed import parse

SCHEMA = 1
RULE = "mean +- max(4 s, 0.25 m) over seeds"
NOT_COMPARED = ("lr", "skipped", "clipped")  # follow from options, or are counted
DEVIATIONS, SHARE, NEIGHBOURS, SEEDS = 4.0, 0.25, 2, 3


@dataclass(frozen=True)
class Limits:
    """Ends of the band of a curve in each of `BINS` bins; null where the runs have no value."""

    low: list[float | None]
    high: list[float | None]

    def recent(self, stage: Trained, key: str) -> tuple[float, float] | None:
        """The means of both ends over the bins of `stage.recent(key)` that have a value there."""
        found = stage.window(binned(stage.curves.get(key, ())))
        ends = [stage.window(self.low), stage.window(self.high)]
        low, high = (
            mean([end if value is not None else None for value, end in zip(found, each, strict=True)])
            for each in ends
        )
        return None if low is None or high is None else (low, high)

    def middle(self) -> list[float | None]:
        """The means of the runs."""
        return [
            None if low is None or high is None else (low + high) / 2
            for low, high in zip(self.low, self.high, strict=True)
        ]


@dataclass(frozen=True)
class StageBand:
    """A training stage: `settings`, `optim` and `monitor` as in `Trained`, and the limits of its curves."""

    settings: dict[str, Any]
    optim: dict[str, Any]
    monitor: dict[str, Any] | None
    curves: dict[str, Limits]


@dataclass(frozen=True)
class Band:
    """The file `recipes/reference/<recipe>.json`.

    Attributes:
        made: of what: commit, versions, runs. seeds: of the runs. rule: of the limits.
        protocol: of the evaluation. rows: "label, steps" -> metric -> [low, high].
    """

    recipe: str
    seeds: list[int]
    made: dict[str, str]
    protocol: dict[str, Any] | None
    stages: dict[str, StageBand]
    rows: dict[str, dict[str, list[float]]]
    rule: str = RULE
    schema: int = SCHEMA

    def limits(self, stage: Trained, key: str) -> tuple[float, float] | None:
        """The band of `stage.recent(key)`, where the band holds for it and has that curve."""
        known = self.stages.get(stage.name)
        if known is None or key not in known.curves or differing(known.settings, stage.settings):
            return None
        if key.startswith("eval/") and known.monitor != stage.monitor:
            return None
        return known.curves[key].recent(stage, key)

    def row(self, measured: Measured, label: str, steps: int) -> Mapping[str, list[float]]:
        """metric -> limits of a row; empty where it was measured under another protocol."""
        if self.protocol is None or not same_protocol(self.protocol, measured):
            return {}
        return self.rows.get(f"{label}, {steps}", {})


def same_protocol(protocol: Mapping[str, Any], measured: Measured) -> bool:
    """Whether numbers of an evaluation compare with those of a protocol."""
    ours = measured.protocol.to_dict()
    return all(ours[key] == value for key, value in protocol.items())


def differing(reference: Mapping[str, Any], found: Mapping[str, Any], path: str = "") -> list[str]:
    """`key: found x, reference y` for each entry that differs."""
    lines: list[str] = []
    for key in sorted({*reference, *found}, key=str):
        ours, theirs, where = found.get(key), reference.get(key), f"{path}{key}"
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            lines += differing(theirs, ours, f"{where}.")
        elif ours != theirs:
            lines.append(f"{where}: found {ours}, reference {theirs}")
    return lines


def derive(runs: Sequence[Examined], made: Mapping[str, str]) -> Band:
    """The band of finished runs of one recipe with different seeds.

    Raises ValueError where they are too few, not finished, or of several recipes, settings or protocols."""
    first, seeds = runs[0], [run.seed for run in runs]
    if len(set(seeds)) < SEEDS or len(set(seeds)) != len(seeds):
        raise ValueError(f"runs: found the seeds {seeds}, expected at least {SEEDS}, each once")
    for run in runs:
        if run.recipe != first.recipe or run.stages.keys() != first.stages.keys():
            raise ValueError(f"{run.name}: is not a run of the same recipe and stages as {first.name}")
        if unfinished := [stage.name for stage in run.stages.values() if not stage.finished]:
            raise ValueError(f"{run.name}: {unfinished[0]}: is not finished, expected a finished run")
        if first.measured is None or run.measured is None:
            raise ValueError(f"{run.name}: has no evaluation, expected a finished run")
        if not same_protocol(_protocol(first.measured), run.measured):
            raise ValueError(f"{run.name}: was measured under another protocol than {first.name}")
        for name, stage in run.stages.items():
            for ours, theirs in (
                (stage.settings, first.stages[name].settings),
                (stage.optim, first.stages[name].optim),
            ):
                if lines := differing(theirs, ours):
                    raise ValueError(f"{run.name}: {name}: {lines[0]}; expected equal settings")
    assert first.measured is not None
    return Band(
        recipe=first.recipe,
        seeds=seeds,
        made=dict(made),
        protocol=_protocol(first.measured),
        stages={name: _stage_band([run.stages[name] for run in runs]) for name in first.stages},
        rows=_rows([run.measured for run in runs if run.measured is not None]),
    )


def _protocol(measured: Measured) -> dict[str, Any]:
    free = ("floor", "names", "straightness_steps", "full_count")
    return {key: value for key, value in measured.protocol.to_dict().items() if key not in free}


def _stage_band(stages: Sequence[Trained]) -> StageBand:
    first = stages[0]
    keys = [
        key
        for key in first.curves
        if all(key in stage.curves for stage in stages) and key.rpartition("/")[2] not in NOT_COMPARED
    ]
    curves = {key: _limits([binned(stage.curves[key]) for stage in stages]) for key in keys}
    monitor = None if first.monitor is None else dict(first.monitor)
    return StageBand(dict(first.settings), dict(first.optim), monitor, curves)


def _limits(curves: Sequence[Sequence[float | None]]) -> Limits:
    """The limits of binned curves of several seeds."""
    columns: list[list[float]] = [
        [value for value in column if value is not None] for column in zip(*curves, strict=True)
    ]
    whole = [column if len(column) == len(curves) else [] for column in columns]
    sizes = [abs(statistics.fmean(column)) for column in whole if column]
    usual = statistics.median(sizes) if sizes else 0.0
    low: list[float | None] = []
    high: list[float | None] = []
    for number, column in enumerate(whole):
        near = whole[max(0, number - NEIGHBOURS) : number + NEIGHBOURS + 1]
        ends = _ends(column, [part for part in near if part], usual) if column else (None, None)
        low.append(ends[0])
        high.append(ends[1])
    return Limits(low, high)


def _ends(
    values: Sequence[float], near: Sequence[Sequence[float]], usual: float = 0.0
) -> tuple[float, float]:
    """`RULE` for values of several seeds, with s from all of `near`."""
    middle = statistics.fmean(values)
    deviation = math.sqrt(statistics.fmean([statistics.variance(part) for part in near]))
    half = max(DEVIATIONS * deviation, SHARE * max(abs(middle), usual))
    return _short(middle - half), _short(middle + half)


def _short(value: float) -> float:
    """Four digits: files stay small."""
    return float(f"{value:.4g}")


def _rows(measured: Sequence[Measured]) -> dict[str, dict[str, list[float]]]:
    """Limits of the metrics of samples in rows that all evaluations have."""
    names = [known.name for known in metrics("images") if known.monitored]
    found: dict[str, dict[str, list[float]]] = {}
    for row in measured[0].rows:
        rows = [each.row(row["model"], row["steps"]) for each in measured]
        limits = {}
        for name in names:
            values = [float(each[name]) for each in rows if each is not None and each.get(name) is not None]
            if len(values) == len(measured):
                limits[name] = list(_ends(values, [values]))
        if limits:
            found[f"{row['model']}, {row['steps']}"] = limits
    return found


def write_band(band: Band, path: Path) -> None:
    """Write the file of a recipe."""
    write_json(path, asdict(band))


def read_band(path: Path) -> Band | None:
    """The band in a file; None where there is none. Raises ValueError naming the entry that is wrong."""
    return parse(Band, read_json(path), f"{path}: ") if path.is_file() else None

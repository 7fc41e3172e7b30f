"""What `distill.doctor` looks at: the curves of a run's training stages, the rows of its evaluation, and its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.evaluation.metrics.diversity import class_std, pixel_std
from distill.evaluation.protocol import Protocol

BINS = 20  # of a stage's planned steps: curves are compared as means over each
RECENT = 5  # bins whose mean is the value of a curve "now"

Curve = Sequence[tuple[float, float | None]]  # (share of the planned steps, value; None: not finite)


def bin_of(at: float) -> int:
    """The number of the bin that ends at or after a share (0, 1] of the planned steps."""
    return min(BINS - 1, max(0, math.ceil(at * BINS - 1e-9) - 1))


def binned(curve: Curve) -> list[float | None]:
    """Means of the finite values in each of `BINS` bins; None where there are none."""
    parts: list[list[float]] = [[] for _ in range(BINS)]
    for at, value in curve:
        if value is not None:
            parts[bin_of(at)].append(value)
    return [sum(part) / len(part) if part else None for part in parts]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is not None; None where nothing is left."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Spread:
    """Statistics of samples of the data: their smallest and largest value, their spread over all values, and of a pixel
    over samples (of a class).

    `ranged`: the samples are images, whose values are in [-1, 1]."""

    low: float
    high: float
    std: float
    pixel_std: float
    class_std: float | None
    count: int
    ranged: bool


def spread_of(samples: Tensor, labels: Tensor | None, ranged: bool) -> Spread:
    """The statistics of samples [N,*S] with labels [N], if they have any."""
    known = labels is not None and int(labels.unique(return_counts=True)[1].min()) > 1
    return Spread(
        low=float(samples.min()),
        high=float(samples.max()),
        std=float(samples.double().std()),
        pixel_std=pixel_std(samples),
        class_std=class_std(samples, labels) if known and labels is not None else None,
        count=len(samples),
        ranged=ranged,
    )


@dataclass(frozen=True)
class Trained:
    """A training stage as far as it has come.

    Attributes:
        settings: what its curves depend on: method, data, network, steps, batch size; not the optimizers, which may be what
            is off. optim: the optimizers, by update. monitor: what evaluations while training depend on.
        steps: planned steps of the student. at: share of them that is logged.
        curves: key of the log -> curve, also of what the monitor and the method's diagnostics log.
        start_share: share of the weights that training began with in the student's average at the end of training; None
            without an average.
        data: statistics of its data; None where it has none of its own, or they could not be read.
    """

    name: str
    settings: Mapping[str, Any]
    optim: Mapping[str, Any]
    monitor: Mapping[str, Any] | None
    steps: int
    at: float
    curves: Mapping[str, Curve]
    start_share: float | None = None
    data: Spread | None = None

    def values(self, key: str) -> list[float]:
        """The finite values of a curve in their order."""
        return [value for _, value in self.curves.get(key, ()) if value is not None]

    def recent(self, key: str) -> float | None:
        """The mean of a curve over the last `RECENT` bins so far."""
        return mean(self.window(binned(self.curves.get(key, ()))))

    def window(self, bins: Sequence[float | None]) -> Sequence[float | None]:
        """The last `RECENT` bins so far."""
        last = bin_of(self.at)
        return bins[max(0, last - RECENT + 1) : last + 1]

    @property
    def finished(self) -> bool:
        """Whether all steps are logged."""
        return self.at >= 1


@dataclass(frozen=True)
class Measured:
    """An evaluation: its rows, the values of real images, and for each model (label of rows) the stage that made it."""

    protocol: Protocol
    rows: Sequence[Mapping[str, Any]]
    real: Mapping[str, float | None]
    stages: Mapping[str, str] = field(default_factory=dict)

    def row(self, label: str, steps: int) -> Mapping[str, Any] | None:
        """The row of a model and a step count, if it was measured."""
        return next((row for row in self.rows if (row["model"], row["steps"]) == (label, steps)), None)


@dataclass(frozen=True)
class Examined:
    """A run: see `Trained` and `Measured`. `elsewhere`: an evaluation of samples that were made outside of the run. `notes`:
    what could not be looked at."""

    name: str
    recipe: str
    seed: int
    stages: Mapping[str, Trained]
    measured: Measured | None = None
    elsewhere: Measured | None = None
    notes: Sequence[str] = ()

"""Energy distance (Székely & Rizzo 2013): needs no features and no bandwidth, and is 0 for equal distributions alone.

    D(x, y) = 2 E|X - Y| - E|X - X'| - E|Y - Y'|

Two estimators. The V-statistic takes X' and Y' over all pairs, a point with itself included: it is never negative,
but two samples of one distribution score about E|X - X'| / n + E|Y - Y'| / m. The unbiased one (the default) leaves
those pairs out: it scores 0 on average there, hence also below 0. No root is taken. Units are those of the samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.evaluation.checks import as_pair, as_rows
from distill.evaluation.metric import Metric
from distill.evaluation.samples import Samples

CHUNK = 512  # rows of the table of distances that are held at a time


def distance_sum(x: Tensor, y: Tensor) -> float:
    """Sum of |x_i - y_j| over all pairs of rows x [N, D] and y [M, D], in float64."""
    # Not by the expansion |x|^2 - 2xy + |y|^2, which leaves points a rounding error away from themselves.
    mode = "donot_use_mm_for_euclid_dist"
    return float(sum(torch.cdist(part, y, compute_mode=mode).sum() for part in x.split(CHUNK)))


def spread(x: Tensor, *, unbiased: bool = True, name: str = "samples") -> float:
    """E|X - X'| of samples x [N, ...]: over pairs of different samples, or with `unbiased=False` over all.

    Raises ValueError for fewer samples than that needs (2 or 1) or non-finite values.
    """
    rows = as_rows(name, x, at_least=2 if unbiased else 1)
    count = len(rows)
    return distance_sum(rows, rows) / (count * (count - 1 if unbiased else count))


def energy_distance(
    x: Tensor, y: Tensor, *, unbiased: bool = True, spread_of_y: float | None = None
) -> float:
    """D of samples x [N, ...] and y [M, ...] of one shape, N and M free; see the module for the two estimators.

    `spread_of_y` is `spread(y)` of the same estimator, where y is compared with many x. Raises ValueError for too few
    samples (2 a set, or 1), differing sizes or non-finite values.
    """
    a, b = as_pair(("generated samples", "reference samples"), x, y)
    between = distance_sum(a, b) / (len(a) * len(b))
    of_y = spread(b, unbiased=unbiased, name="reference samples") if spread_of_y is None else spread_of_y
    return 2 * between - spread(a, unbiased=unbiased, name="generated samples") - of_y


def _spread(x: Samples) -> float:
    return spread(x.values, name=f"{x.name} samples")


ENERGY = Metric(
    "energy",
    order=70,
    measure=lambda x: energy_distance(x.values, x.real.values, spread_of_y=x.real.once(_spread)),
    meaning="energy distance to fresh data, unbiased, so a perfect model scores about 0 and may score below",
    of="points",
    form=".4f",
    better="lower",
    floor=True,
)
